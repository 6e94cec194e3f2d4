"""Use cases of the service, without HTTP and SQL."""
