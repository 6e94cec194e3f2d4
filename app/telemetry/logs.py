"""The log: JSON, or readable text at a terminal; each line has the id of its request."""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.types import EventDict, Processor

from app.telemetry.request_record import request_now


def configure_logging(level: str) -> None:
    """Write the log lines of the service and of its libraries to standard error."""
    stamp: list[Processor] = [_stamp]
    render: list[Processor] = [structlog.processors.format_exc_info, _as_json]
    if sys.stderr.isatty():
        stamp = [structlog.processors.add_log_level, structlog.processors.TimeStamper("%H:%M:%S")]
        # structlog's default shows the local variables, and among them tokens and keys.
        plain = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    # The many lines about requests bypass the standard library, which doubles their cost.
    structlog.configure(
        processors=[*stamp, render[-1], cast("Processor", _as_bytes)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=lambda *_: _LineWriter(sys.stderr.buffer),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*stamp, structlog.stdlib.add_logger_name, _add_request],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                *render,
                cast("Processor", _as_text),
            ],
        )
    )
    root = logging.getLogger()
    for previous in list(root.handlers):
        if isinstance(previous.formatter, ProcessorFormatter):
            root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per call adds nothing
    logging.getLogger("uvicorn.asgi").setLevel(logging.INFO)  # level TRACE shows headers
    # Its warning about an unreadable OTEL_EXPORTER_OTLP_HEADERS repeats the value, a secret.
    logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
    _reformat_server_log()


class _LineWriter:
    """Writes all lines of one turn of the event loop with one system call."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []

    def info(self, line: bytes) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._flush)
        self._lines.append(line)

    warning = info

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._stream.write(b"\n".join([*lines, b""]))
        self._stream.flush()


def _reformat_server_log() -> None:
    """Format uvicorn's lines like all others; drop its access log, which repeats our lines."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # Without `python -m app`, uvicorn logs the queries of WebSocket handshakes.
    logging.getLogger("uvicorn.error").addFilter(_is_no_handshake)


def _is_no_handshake(record: logging.LogRecord) -> bool:
    return '"WebSocket ' not in str(record.msg)


def _stamp(_logger: Any, method: str, event: EventDict) -> EventDict:
    event["level"] = method
    event["timestamp"] = datetime.now(UTC)
    return event


def _add_request(_logger: Any, _method: str, event: EventDict) -> EventDict:
    if record := request_now.get():
        event["request_id"] = record.request_id
        event["trace_id"] = record.trace_id
    return event


def _as_json(_logger: Any, _method: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z)


def _as_bytes(_logger: Any, _method: str, line: str | bytes) -> bytes:
    return line.encode() if isinstance(line, str) else line


def _as_text(_logger: Any, _method: str, line: str | bytes) -> str:
    return line.decode() if isinstance(line, bytes) else line
