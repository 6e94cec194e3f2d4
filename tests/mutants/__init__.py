"""Mutation tests: each mistake in a copy of the project makes a property test fail."""
