"""Attacks on the service with only a network connection, or with a key of another role."""
