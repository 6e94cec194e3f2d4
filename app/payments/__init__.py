"""Use cases: what the service does for its callers."""
