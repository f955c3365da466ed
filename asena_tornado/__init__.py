"""Real-time WebSocket rooms for Python, on Tornado."""
