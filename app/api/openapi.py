"""The OpenAPI document: what FastAPI cannot derive from the code of the routes."""

from collections.abc import Callable, Sequence
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
        "description": "identity: the service does not accept compressed bodies.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "Seconds to wait before a retry.",
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
CHARGED = {
    "no": "The user is not charged by this request.",
    "unknown": "**It is unknown whether the user was charged.**",
}

# A model, and whether the document shows how it is read (validation) or written (serialization).
Models = Sequence[tuple[type[BaseModel], JsonSchemaMode]]


class SchemasAsWritten(GenerateJsonSchema):
    """Keeps the fields of examples in the order of the model instead of sorting them."""

    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        return value


def add_schemas(app: FastAPI, models: Models) -> None:
    """Add models to the document that FastAPI does not find in the signatures of the routes."""
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

    app.openapi = make_document  # type: ignore[method-assign]  # FastAPI documents this way


def document_token(app: FastAPI) -> None:
    """Document that operations with a response 401 require a token."""
    document = app.openapi()
    document["components"]["securitySchemes"] = {"token": TOKEN_SCHEME}
    for operations in document["paths"].values():
        for operation in operations.values():
            if "401" in operation["responses"]:
                operation["security"] = [{"token": []}]


def json_content(model: type[BaseModel], **examples: object) -> dict[str, Any]:
    """Describe a body with the schema of a model; pass `example` or `examples`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"application/json": {"schema": schema, **examples}}


def describe_problem(problem: type[PaymentError]) -> str:
    """Return a line of Markdown: what a problem means and what the caller should do."""
    return f"- `{problem.code}`: {problem.meaning} {problem.advice}"


def describe_debit_problem(problem: type[PaymentError]) -> str:
    """Return a line of Markdown that also says whether the user was charged."""
    return f"- `{problem.code}`: {problem.meaning} {CHARGED[problem.money_moved]} {problem.advice}"


def problem_responses(
    *problems: type[PaymentError],
    describe: Callable[[type[PaymentError]], str] = describe_problem,
    examples: Sequence[PaymentError] = (),
) -> dict[int | str, dict[str, Any]]:
    """Describe problems: one entry for each status, with one example for each code.

    `examples` replace the examples that the classes give.
    """
    special = {example.code: example for example in examples}
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
        response["description"] += f"{describe(problem)}\n"
        response["content"][MEDIA_TYPE]["examples"][problem.code] = {
            "summary": problem.title,
            "value": make_body(special.get(problem.code) or _example(problem), EXAMPLE_REQUEST_ID),
        }
        for name in problem.headers.keys() & PROBLEM_HEADERS.keys():
            response.setdefault("headers", {})[name] = PROBLEM_HEADERS[name]
    return responses


def _example(problem: type[PaymentError]) -> PaymentError:
    fields = problem.extension.model_fields if problem.extension else {}
    members = {name: (field.examples or [None])[0] for name, field in fields.items()}
    return problem(problem.example_detail, **members)
