"""What is read from a request for a payment: who sends it, its body, its key."""

import asyncio
import re

from pydantic import ValidationError
from starlette.requests import Request

from app import errors
from app.auth import Authentication
from app.problems import invalid_body, invalid_header
from app.schemas import KEY_PATTERN, DebitRequest

BODY_BYTES_MAX = 16 * 1024


async def authenticate(request: Request, authentication: Authentication, deadline: float) -> str:
    """Check the caller's token, and return it for the products service, which asks for one.

    Raises:
        Unauthenticated, Forbidden: the caller may not do this.
        AuthenticationUnavailable: that cannot be told, or not before the deadline.
    """
    authorizations = request.headers.getlist("authorization")
    if len(authorizations) > 1:
        raise errors.Unauthenticated("There is more than one Authorization header: send one")
    authorization = authorizations[0] if authorizations else None
    try:
        async with asyncio.timeout_at(deadline):
            return await authentication.authenticate(authorization)
    except TimeoutError as error:
        raise errors.AuthenticationUnavailable from error


async def read_debit(request: Request) -> DebitRequest:
    """Read and check the body by hand: strict JSON, and never more of it than is allowed.

    Raises:
        InvalidRequest: it is not as documented.
        RequestTooLarge: there is more of it.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise errors.RequestTooLarge
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid_header("Content-Type", "Should be application/json")
    try:
        return DebitRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        raise invalid_body(error) from None


def read_key(request: Request) -> str | None:
    """Read the Idempotency-Key, bare or in quotes; None if there is none.

    Raises:
        InvalidRequest: it is not as documented.
    """
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not re.fullmatch(KEY_PATTERN, keys[0]):
        raise invalid_header(
            "Idempotency-Key", 'Should be one key of 1 to 255 visible ASCII characters without "'
        )
    return keys[0].strip('"')
