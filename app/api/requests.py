"""Read the token, the body and the idempotency key of a request."""

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app import errors
from app.api.problems import ERRORS_MAX
from app.api.schemas import KEY_PATTERN
from app.auth.authentication import Authentication, Caller

Body = TypeVar("Body", bound=BaseModel)

BODY_BYTES_MAX = 16 * 1024
BODY_SECONDS_MAX = 10.0
FIELDS_MAX = 20
ENCODING_LENGTH_MAX = 40  # of an encoding that the caller named

CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s;"']+)""", re.IGNORECASE)
# A debit contains ASCII only, which is the same in all these encodings.
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "iso-8859-15", "windows-1252")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
DUPLICATE = "The name appears more than once"
LEADING_ZERO = re.compile(rb":\s*-?0[0-9]")
LEADING_ZERO_ADVICE = (
    "In JSON a number has no leading zeros: send a card number as a string or without them"
)
POINTER_LENGTH_MAX = 100


async def authenticate(
    request: Request, authentication: Authentication | None, deadline: float
) -> Caller:
    """Check the caller's token, if one is required, and return the caller.

    Raises:
        Unauthenticated, Forbidden: the token is missing or invalid, or does not allow this.
        AuthenticationUnavailable: the token cannot be checked before the deadline.
    """
    if authentication is None:
        return Caller()
    authorizations = request.headers.getlist("authorization")
    if len(authorizations) > 1:
        raise errors.Unauthenticated("There is more than one Authorization header: send one")
    authorization = authorizations[0] if authorizations else None
    try:
        async with asyncio.timeout_at(deadline):
            return await authentication.authenticate(authorization)
    except TimeoutError as error:
        raise errors.AuthenticationUnavailable from error


async def read_body(request: Request, model: type[Body]) -> Body:
    """Read the body as a model: strict JSON in UTF-8, within the limits of size and time.

    Raises:
        InvalidRequest: the body does not match the model.
        RequestTooLarge, RequestTimeout: the body is too large or did not arrive in time.
        UnsupportedEncoding: the body is compressed or is not in UTF-8.
    """
    body = await _receive_body(request)
    _check_headers(request)
    body_without_mark = body.removeprefix(BYTE_ORDER_MARK)
    colons = body.count(b":")
    if colons > FIELDS_MAX:
        _reject_too_many_fields(body_without_mark)
    try:
        read = model.model_validate_json(body_without_mark)
    except ValidationError as error:
        _reject_encoding(body)
        raise _invalid_body(error, body) from None
    # Each member of an object has a colon. More colons than fields can mean duplicate names.
    if colons > len(read.model_fields_set):
        _reject_duplicates(body_without_mark)
    return read


def _check_headers(request: Request) -> None:
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise _unsupported(f"compressed ({coding[:ENCODING_LENGTH_MAX]})")
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        raise _invalid_header("Content-Type", "Should be application/json")
    charset = CHARSET.search(parameters)
    if charset and charset[1].lower() not in CHARSETS:
        raise _unsupported(f"in {charset[1][:ENCODING_LENGTH_MAX]}")


async def _receive_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise errors.RequestTooLarge
    except TimeoutError:
        raise errors.RequestTimeout from None
    return bytes(body)


def _reject_encoding(body: bytes) -> None:
    """Raise UnsupportedEncoding if the encoding explains why the body is not JSON."""
    if body.startswith(GZIP):
        raise _unsupported("compressed (gzip)")
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise _unsupported(f"in {encoding.upper()}")


def _unsupported(what: str) -> errors.UnsupportedEncoding:
    return errors.UnsupportedEncoding(
        f"The body is {what}; send it in UTF-8, without Content-Encoding"
    )


def _reject_too_many_fields(body: bytes) -> None:
    """Reject a body with too many fields early: checking all of them would take milliseconds."""
    count = 0

    def count_fields(members: list[tuple[str, object]]) -> None:
        nonlocal count
        count += len(members)
        if count > FIELDS_MAX:
            raise _too_many_fields(FIELDS_MAX)

    with suppress(ValueError, RecursionError):
        json.loads(body, object_pairs_hook=count_fields)


def _reject_duplicates(body: bytes) -> None:
    duplicates: set[str] = set()

    def find_duplicates(members: list[tuple[str, object]]) -> None:
        names = [name for name, _ in members]
        duplicates.update(name for name in names if names.count(name) > 1)

    json.loads(body, object_pairs_hook=find_duplicates)
    if duplicates:
        raise _duplicate_names(sorted(duplicates))


def read_key(request: Request) -> str | None:
    """Return the header Idempotency-Key without its quotes, or None.

    Raises:
        InvalidRequest: the key is not valid, or there are several.
    """
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not re.fullmatch(KEY_PATTERN, keys[0]):
        raise _invalid_header(
            "Idempotency-Key", 'Should be one key of 1 to 255 visible ASCII characters without "'
        )
    return keys[0].strip('"')


def read_outcome_key(request: Request, key_of_query: str | None) -> str:
    """Return the key of a lookup, from the header or the query.

    Raises:
        InvalidRequest: there is no key, there are two different keys, or a parameter appears twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise _invalid_parameters(DUPLICATE, duplicates)
    key = read_key(request) or key_of_query
    if key is None:
        raise _invalid_parameters("Field required, here or as Idempotency-Key", ["idempotency_key"])
    if key_of_query not in (None, key):
        raise _invalid_parameters("Differs from the header Idempotency-Key", ["idempotency_key"])
    return key


def _invalid_body(error: ValidationError, body: bytes) -> errors.InvalidRequest:
    """Return a problem that lists the place of each fault, without values of the body."""
    faults = [
        {"pointer": _json_pointer(fault["loc"]), "detail": fault["msg"]}
        for fault in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    if error.errors()[0]["type"] == "json_invalid" and LEADING_ZERO.search(body):
        faults[0]["detail"] += f". {LEADING_ZERO_ADVICE}"
    return errors.InvalidRequest("The body is not as documented", errors=faults[:ERRORS_MAX])


def _too_many_fields(fields_max: int) -> errors.InvalidRequest:
    fault = {"pointer": "#", "detail": f"Should have at most {fields_max} fields"}
    return errors.InvalidRequest("The body is not as documented", errors=[fault])


def _duplicate_names(names: Sequence[str]) -> errors.InvalidRequest:
    faults = [{"pointer": _json_pointer((name,)), "detail": DUPLICATE} for name in names]
    return errors.InvalidRequest("The body is not as documented", errors=faults[:ERRORS_MAX])


def _invalid_parameters(detail: str, names: Sequence[str]) -> errors.InvalidRequest:
    faults = [{"parameter": name, "detail": detail} for name in names]
    return errors.InvalidRequest("A parameter is not as documented", errors=faults[:ERRORS_MAX])


def _invalid_header(name: str, detail: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"Header {name}: {detail}", errors=[{"header": name, "detail": detail}]
    )


def _json_pointer(location: tuple[int | str, ...]) -> str:
    """Return a location as a JSON Pointer (RFC 6901), shortened if the caller's names are long."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in location)
    return "".join(["#", *(f"/{step}" for step in steps)])[:POINTER_LENGTH_MAX]
