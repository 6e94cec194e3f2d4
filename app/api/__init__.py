"""HTTP: routes, what is read from requests, schemas, problems and the documentation pages."""
