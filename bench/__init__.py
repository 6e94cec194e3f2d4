"""Measure how fast the service is, beside its peers and beside earlier revisions."""
