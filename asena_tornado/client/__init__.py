"""Who connects: a WebSocket client for tests, notebooks and scripts."""
