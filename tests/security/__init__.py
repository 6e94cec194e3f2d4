"""Attacks on the service with a network connection only, or with a less privileged key."""
