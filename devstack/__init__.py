"""Everything the service needs on a laptop; for development and tests, never in the image."""
