"""Checks of the environment variables that libraries read themselves."""

import os
import re
import ssl
from pathlib import Path

import httpx

from app.environment.variables import CANNOT_START, SettingsError

SAMPLERS = "(parentbased_)?(always_on|always_off|traceidratio)"
# Names of variables, their valid values, and what to write instead of an invalid one.
# https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
TRACE_RULES = [
    (re.compile(name), re.compile(value, re.IGNORECASE), advice)
    for name, value, advice in (
        (r"OTEL_BSP_\w+", r"[1-9]\d{0,8}", "a whole number without a unit, such as 512"),
        (r"OTEL_\w+_LIMIT", r"\d{1,9}", "a whole number, such as 128"),
        (r"OTEL_EXPORTER_OTLP_(TRACES_)?TIMEOUT", r"\d{1,9}(\.\d+)?", "a number, such as 10"),
        ("OTEL_TRACES_SAMPLER", SAMPLERS, "always_on, always_off, traceidratio or parentbased_..."),
        ("OTEL_TRACES_SAMPLER_ARG", r"0?\.\d+|[01](\.0*)?", "a number from 0 to 1, such as 0.1"),
        (r"OTEL_\w+_COMPRESSION", "none|gzip|deflate", "none, gzip or deflate"),
    )
]
TRACE_FILES = re.compile(
    r"OTEL_EXPORTER_OTLP_(TRACES_)?(CERTIFICATE|CLIENT_KEY|CLIENT_CERTIFICATE)"
    r"|(REQUESTS|CURL)_CA_BUNDLE"
)


def load_certificates() -> ssl.SSLContext:
    """Load the trusted certificates, from the same places as httpx.

    Raises:
        SettingsError: SSL_CERT_FILE or SSL_CERT_DIR contains no readable certificates.
    """
    file, folders = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and folders and not any(map(os.path.isdir, folders.split(os.pathsep))):
        raise SettingsError(f"{CANNOT_START}: SSL_CERT_DIR should be a folder of certificates.")
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        raise SettingsError(
            f"{CANNOT_START}: {name} should be a readable file of certificates (PEM), but reading "
            f"it failed ({_reason(error)})."
        ) from error


def check_trace_variables() -> None:
    """Check OpenTelemetry's variables: it would log a traceback and use its default.

    Raises:
        SettingsError: values are invalid; the message names each variable.
    """
    problems = [
        f"  {name}: {problem}"
        for name, value in sorted(os.environ.items())
        if (problem := _trace_problem(name, value.strip()))
    ]
    if problems:
        raise SettingsError(
            "\n".join([f"{CANNOT_START}. These environment variables are invalid:", *problems])
        )


def trace_variables() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("OTEL_"))


def _trace_problem(name: str, value: str) -> str | None:
    if not value:
        return None
    if TRACE_FILES.fullmatch(name):
        return _file_problem(Path(value))
    for names, values, advice in TRACE_RULES:
        if names.fullmatch(name) and not values.fullmatch(value):
            return f"should be {advice}"
    return None


def _file_problem(path: Path) -> str | None:
    try:
        if not path.is_dir():
            path.open("rb").close()
    except OSError as error:
        return f"should be a readable file, but reading it failed ({_reason(error)})"
    return None


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
