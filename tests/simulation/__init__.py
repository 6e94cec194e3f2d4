"""Deterministic simulation: the service on a virtual clock, against a model of its database."""
