"""Errors in the format of PostgREST, and the HTTP status for each Postgres error code."""

import json
import re

import psycopg
from starlette.responses import Response

# https://docs.postgrest.org/en/v12/references/errors.html; the longest prefix decides.
STATUS_BY_CODE = {
    **dict.fromkeys(("08", "53", "57P01"), 503),
    **dict.fromkeys(("0L", "0P", "28", "42501"), 403),
    **dict.fromkeys(("23503", "23505"), 409),
    **dict.fromkeys(("42883", "42P01"), 404),
    **dict.fromkeys(("09", "21", "25", "2D", "38", "39", "3B", "40", "42P17", "53400"), 500),
    **dict.fromkeys(("54", "55", "57", "58", "F0", "HV", "P0", "XX"), 500),
    **dict.fromkeys(("P0001",), 400),
    "25006": 405,
}


class GatewayError(Exception):
    """An error response instead of the result of the function."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: str | None = None,
        hint: str | None = None,
        challenge: str = "Bearer",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "details": details, "hint": hint, "message": message}
        self.challenge = challenge

    def response(self) -> Response:
        """Return the HTTP response for this error."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = self.challenge
        if self.status == 503:
            headers["Retry-After"] = "0"
        return Response(
            json.dumps(self.body, ensure_ascii=False, separators=(",", ":")),
            status_code=self.status,
            headers=headers,
            media_type="application/json; charset=utf-8",
        )


def status_of(code: str, role: str) -> int:
    """Return the HTTP status for a Postgres error; 401 instead of 403 for anonymous requests."""
    if raised := re.fullmatch(r"PT(\d{3})", code):
        return int(raised[1])
    if code.startswith("PT"):
        return 500
    status = next(
        (STATUS_BY_CODE[code[:n]] for n in (5, 4, 3, 2) if code[:n] in STATUS_BY_CODE), 400
    )
    return 401 if status == 403 and code == "42501" and role == "anon" else status


def database_error(error: psycopg.Error, role: str) -> GatewayError:
    """Convert an error of the database to the format of PostgREST."""
    code = error.sqlstate or "XX000"
    return GatewayError(
        status_of(code, role),
        code,
        error.diag.message_primary or "",
        details=error.diag.message_detail,
        hint=error.diag.message_hint,
    )
