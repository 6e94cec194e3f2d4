"""The dependencies of the service on a laptop, for development and tests; not part of the image."""
