"""Environment variables: how they are read and what their values may be."""
