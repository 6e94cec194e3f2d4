"""Authentication: bearer tokens and the keys of their issuer."""
