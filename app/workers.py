"""One process: several would each show a part of the metrics, and each have its own limits."""

import gc
import multiprocessing
import os
import signal

SERVER_CONFIGS = ("uvicorn.config", "gunicorn.config", "hypercorn.config")
REASON = (
    "The service cannot start with {workers} workers: it is one process, because /metrics shows "
    "only one. Start it with `python -m app`, without --workers and WEB_CONCURRENCY; for more "
    "throughput, run more pods or containers."
)


class SeveralWorkersError(Exception):
    """The server was told to run several processes."""


def refuse_several_workers() -> None:
    """Find out how many worker processes the server was told to run.

    Raises:
        SeveralWorkersError: more than one.
    """
    workers = _count_workers()
    if workers == 1:
        return
    if supervisor := multiprocessing.parent_process():
        os.kill(supervisor.pid or 0, signal.SIGTERM)  # uvicorn's would start the next one, forever
    raise SeveralWorkersError(REASON.format(workers=workers))


def _count_workers() -> int:
    """Read the server's own configuration, whether a command line, file or program made it."""
    environment = os.environ.get("WEB_CONCURRENCY", "")
    workers = [int(environment)] if environment.isdecimal() else []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__name__ == "Config" and kind.__module__ in SERVER_CONFIGS:
            workers.append(thing.workers)
    return max(workers, default=1)
