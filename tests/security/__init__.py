"""Attacks on the service, as somebody who can only open a connection or holds a lower key."""
