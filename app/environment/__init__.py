"""Environment variables: reading them and checking their values."""
