// Opens Swagger UI on the service's own document; a file, since the page allows no inline script.
SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: false, // a token is forgotten with the page
  tryItOutEnabled: false,
  validatorUrl: null, // else it sends the document to a foreign validator
});
