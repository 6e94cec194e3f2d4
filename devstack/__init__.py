"""The service's dependencies for development and tests on a laptop; not part of the image."""
