"""Reading environment variables and the file `.env`."""

import difflib
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from dotenv.main import resolve_variables
from dotenv.parser import Binding, parse_stream

CANNOT_START = "The service cannot start"
ENV_FILE = Path(".env")
# SUPABASE_ANON_KEY, which other programs use, has a similarity of 0.83 to SUPABASE_KEY.
SIMILARITY_MIN = 0.85
# Variables that libraries read themselves.
LIBRARY_NAME = re.compile(
    r"OTEL_\w+|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE
)
# Kubernetes describes each service of the namespace in variables that are named after it.
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
SERVICE_LINK = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")


class SettingsError(Exception):
    """Settings are missing or invalid; the message names each of them, and repeats no value."""


class Environment(NamedTuple):
    """Environment variables by their names in upper case.

    `values` are the known variables that are not empty, `empty` the known ones that are empty.
    `unknown` maps each other name to the place where it is set.
    """

    values: dict[str, str]
    empty: set[str]
    unknown: dict[str, str]


@contextmanager
def failure_names_settings(what: str, *settings: str) -> Iterator[None]:
    """Turn a failure in the block into an error that names the settings, without their values.

    Raises:
        SettingsError: the block failed.
    """
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(
            f"{CANNOT_START}: {what} cannot be created ({type(error).__name__}). "
            f"Check {', '.join(settings)}."
        ) from error


def read_environment(known: Collection[str]) -> Environment:
    """Read the environment variables, and from `.env` those that the environment does not have.

    Raises:
        SettingsError: `.env` cannot be read.
    """
    values: dict[str, str] = {}
    empty: set[str] = set()
    unknown: dict[str, str] = {}
    in_file = _read_file(known)
    _export_for_libraries(in_file)
    for place, variables in ((str(ENV_FILE), in_file), ("the environment", dict(os.environ))):
        # If a name is set in upper case and in lower case, the one in upper case is used.
        for name in sorted(variables, key=str.isupper):
            value, name_known = clean(variables[name]), name.upper()
            if name_known not in known:
                unknown[name_known] = place
            elif value:
                values[name_known] = value
            else:
                empty.add(name_known)
    return Environment(values, empty, unknown)


def clean(value: str) -> str:
    """Remove white space and matching quotes around a value.

    `docker run --env-file` and `kubectl create secret --from-env-file` keep the quotes, and a
    secret that was created from a file ends with a line break.
    """
    value = value.strip()
    while len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    return value


def find_meant(name: str, known: Collection[str]) -> str | None:
    """Return the setting that an unknown name resembles, or None."""
    if SERVICE_LINK.fullmatch(name):
        return None
    parts = name.split("_")
    for setting in known:
        is_longer = name.endswith(f"_{setting}")
        setting_parts = setting.split("_")
        is_shorter = (
            len(parts) > 1 and parts[-1] == setting_parts[-1] and set(parts) < set(setting_parts)
        )
        if is_longer or is_shorter:
            return setting
    return next(iter(difflib.get_close_matches(name, known, 1, SIMILARITY_MIN)), None)


def _read_file(known: Collection[str]) -> dict[str, str]:
    bindings = list(parse_stream(StringIO(_read_text())))
    for binding in bindings:
        if binding.error:
            _refuse_if_ours(binding, known)
    pairs = [(line.key, line.value) for line in bindings if line.key is not None and not line.error]
    return {name: value or "" for name, value in resolve_variables(pairs, override=True).items()}


def _read_text() -> str:
    try:
        content = ENV_FILE.read_bytes()
    except FileNotFoundError:
        return ""
    except IsADirectoryError:
        raise _file_error("is a folder. Replace it by a file, or remove it") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _file_error(f"cannot be read ({reason}). Correct that, or remove it") from None
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in content:
        raise _file_error("is saved as UTF-16 or holds NUL bytes. Save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _file_error(f"is not UTF-8 text, see line {line}. Save it as UTF-8") from None


def _refuse_if_ours(line: Binding, known: Collection[str]) -> None:
    """Reject an unreadable line if it names a setting of this service; ignore other lines."""
    text = line.original.string
    names = {name.upper() for name in re.findall(r"\w+", text)}
    if any(name in known or name.startswith("AUTH_") for name in names):
        number = line.original.line + len(text) - len(text.lstrip("\r\n"))
        raise _file_error(f"has a line {number} that is not NAME=value. Correct it, quotes too")


def _export_for_libraries(in_file: dict[str, str]) -> None:
    """Export the variables of `.env` that libraries read, so that they apply to every start."""
    for name, value in {**in_file, **os.environ}.items():
        if LIBRARY_NAME.fullmatch(name):
            os.environ[name] = clean(value)
            if not os.environ[name] and name.startswith("OTEL_"):
                del os.environ[name]  # the SDK fails on an empty number


def _file_error(problem: str) -> SettingsError:
    return SettingsError(f"{CANNOT_START}: {ENV_FILE.absolute()} {problem}.")
