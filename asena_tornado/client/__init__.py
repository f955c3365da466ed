"""A WebSocket client for tests, notebooks and scripts."""
