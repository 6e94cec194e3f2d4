"""HTTP calls of dependencies: transport, limits, failures."""
