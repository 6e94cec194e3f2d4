"""Failures that the ledger client receives from the transport, PostgREST and proxies."""

import errno
import random

import aiohttp
import httpx
from aiohttp.client_reqrep import ConnectionKey
from postgrest.exceptions import APIError

from simulation.schedule import Fault

CONNECTION_KEY = ConnectionKey("gateway", 80, False, True, None, None, None)

# The contract's table of codes (DESIGN, "Supabase errors").
NOT_BEGUN_CODES = ("PGRST000", "PGRST002", "PGRST003", "53300", "25006", "25P02")
ROLLED_BACK_CODES = ("55P03", "57014", "40001", "40P01")
UNKNOWN_CODES = ("PGRST001", "PGRSTX00", "08006", "57P01", "40003", "XX000")
REJECTED_CODES = ("42501", "PGRST202", "PGRST301", "42883", "23514")
PROXY_CODES = (502, "504", "520", None, "", "UPSTREAM_TIMEOUT")


def refused() -> Exception:
    return _transport_error(
        aiohttp.ClientConnectorError(CONNECTION_KEY, OSError(errno.ECONNREFUSED, "refused"))
    )


def no_connection() -> Exception:
    return _transport_error(aiohttp.ConnectionTimeoutError())


def broken(draw: random.Random) -> Exception:
    """Return the error of a connection that broke after sending."""
    causes = (
        aiohttp.ServerDisconnectedError,
        aiohttp.ClientOSError,
        aiohttp.ClientPayloadError,
        aiohttp.SocketTimeoutError,
    )
    return _transport_error(draw.choice(causes)())


def database_lost(draw: random.Random) -> Exception:
    return from_code(draw.choice(("PGRST001", "08006", "57P01")))


def api_error(draw: random.Random, fault: Fault) -> Exception:
    codes: dict[Fault, tuple[str | int | None, ...]] = {
        Fault.NOT_BEGUN: NOT_BEGUN_CODES,
        Fault.UNKNOWN: UNKNOWN_CODES,
        Fault.PROXY_PAGE: PROXY_CODES,
        Fault.REJECTED: REJECTED_CODES,
        Fault.ASKED_TO_WAIT: (429,),
    }
    return from_code(draw.choice(codes[fault]))


def from_code(code: str | int | None) -> Exception:
    return APIError({"code": code, "message": "simulated"})


def invalid_response(draw: random.Random, function: str, data: object) -> object:
    """Return an invalid response for the function."""
    strange: list[object] = [[], {}, "OK", {"outcome": "debited"}, [data], {"outcome": "made_up"}]
    if function != "find_payment":  # which returns null if nothing is stored
        strange.append(None)
    return draw.choice(strange)


def describe(error: BaseException) -> str:
    """Return a short text of a failure for the trace."""
    if isinstance(error, APIError):
        return f"failed: {error.code!r}"
    return f"failed: {type(error.__cause__ or error).__name__}"


def _transport_error(cause: Exception) -> Exception:
    error = httpx.ConnectTimeout("simulated")  # the transport raises this for all causes
    error.__cause__ = cause
    return error
