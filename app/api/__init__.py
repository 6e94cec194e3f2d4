"""HTTP: routes, request parsing, schemas, problems, middleware and documentation pages."""
