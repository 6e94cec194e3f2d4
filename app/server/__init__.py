"""The HTTP server: protocol limits, startup and shutdown."""
