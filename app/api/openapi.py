"""The OpenAPI document: what FastAPI cannot derive from the code of the routes."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import (
    GenerateJsonSchema,
    JsonSchemaMode,
    JsonSchemaValue,
    models_json_schema,
)

from app.api.problems import MEDIA_TYPE, make_body
from app.api.schemas import Problem
from app.errors import PaymentError

EXAMPLE_REQUEST_ID = "0b0e3f6c9a554d2c8f0e4d0f8d0f6a11"

PROBLEM_HEADERS = {
    "Accept-Encoding": {
        "description": "identity: bodies must not be compressed.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds to wait before trying again.",
        "schema": {"type": "integer"},
    },
    "WWW-Authenticate": {
        "description": "How to authenticate (RFC 6750).",
        "schema": {"type": "string"},
    },
}
TOKEN_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "A token of the issuer that this service trusts.",
}


# A model, and whether the document shows what is read (validation) or written (serialization).
Models = Sequence[tuple[type[BaseModel], JsonSchemaMode]]


class SchemasAsWritten(GenerateJsonSchema):
    """Examples show their fields in the order of the model, not of the alphabet."""

    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        return value


def add_schemas(app: FastAPI, models: Models) -> None:
    """Add models that the routes read and write by hand to the document."""
    derive = app.openapi

    def make_document() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        document = derive()
        if is_new:
            _, schemas = models_json_schema(
                [*models, (Problem, "validation")],
                ref_template="#/components/schemas/{model}",
                schema_generator=SchemasAsWritten,
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document

    app.openapi = make_document  # type: ignore[method-assign]  # as FastAPI's manual extends it


def document_token(app: FastAPI) -> None:
    """Document that the operations that can respond with 401 need a token."""
    document = app.openapi()
    document["components"]["securitySchemes"] = {"token": TOKEN_SCHEME}
    for operations in document["paths"].values():
        for operation in operations.values():
            if "401" in operation["responses"]:
                operation["security"] = [{"token": []}]


def json_content(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a body of a model, with the model's example."""
    example = model.model_json_schema(schema_generator=SchemasAsWritten)["examples"][0]
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"application/json": {"schema": schema, "example": example}}


def problem_responses(*problems: type[PaymentError]) -> dict[int | str, dict[str, Any]]:
    """Describe problems: one entry a status, one example a code."""
    responses: dict[int | str, dict[str, Any]] = {}
    for problem in problems:
        response = responses.setdefault(
            problem.status,
            {
                "description": "",
                "content": {
                    MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
                },
            },
        )
        response["description"] = "; ".join(filter(None, [response["description"], problem.title]))
        response["content"][MEDIA_TYPE]["examples"][problem.code] = {
            "summary": problem.title,
            "value": make_body(_example(problem), EXAMPLE_REQUEST_ID),
        }
        for name in problem.headers.keys() & PROBLEM_HEADERS.keys():
            response.setdefault("headers", {})[name] = PROBLEM_HEADERS[name]
    return responses


def _example(problem: type[PaymentError]) -> PaymentError:
    fields = problem.extension.model_fields if problem.extension else {}
    members = {name: (field.examples or [None])[0] for name, field in fields.items()}
    return problem(problem.example_detail, **members)
