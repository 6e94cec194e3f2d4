"""HTTP calls to dependencies: transport, limits, failures."""
