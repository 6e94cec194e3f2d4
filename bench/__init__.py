"""Measurements of the service, compared with its peers and with earlier revisions."""
