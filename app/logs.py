"""The log: JSON for machines, readable at a terminal; every line says of which request it is."""

import json
import logging
import sys
from typing import Any

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.types import EventDict, Processor

from app.tracing import request_now

_encode = json.JSONEncoder(separators=(",", ":"), default=repr).encode


def configure_logging(level: str) -> None:
    """Send to standard error what the service logs itself, and what its libraries do."""
    render: list[Processor] = [structlog.processors.format_exc_info, _as_json]
    if sys.stderr.isatty():
        render = [structlog.dev.ConsoleRenderer()]
    stamp: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Lines of requests are many, and go past the standard library, which doubles their cost.
    structlog.configure(
        processors=[*stamp, *render[-1:]],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*stamp, structlog.stdlib.add_logger_name, _add_request],
            processors=[ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    for former in [one for one in root.handlers if isinstance(one.formatter, ProcessorFormatter)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per call says nothing new
    _take_over_from_server()


def _take_over_from_server() -> None:
    """Give uvicorn's lines the shape of all others; a request has its line already."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


def _add_request(_logger: Any, _method: str, event: EventDict) -> EventDict:
    if ids := request_now.get():
        event["request_id"] = ids.request_id
        event["trace_id"] = ids.trace_id
    return event


def _as_json(_logger: Any, _method: str, event: EventDict) -> str:
    return _encode(event)
