"""The check for a single worker process: each process has its own metrics and limits."""

import multiprocessing
import os
import re
import signal
import sys

from app.environment.variables import CANNOT_START, SettingsError

OPTION = re.compile(r"(?:--workers[= ]|-w ?)(\d+)(?: |$)")


def refuse_several_workers() -> None:
    """Stop the startup if the server is configured to run several worker processes.

    Raises:
        SettingsError: there is more than one worker.
    """
    configured = [os.environ.get("WEB_CONCURRENCY", ""), *OPTION.findall(" ".join(sys.argv[1:]))]
    workers = max((int(count) for count in configured if count.isdecimal()), default=1)
    if workers == 1:
        return
    if supervisor := multiprocessing.parent_process():
        os.kill(supervisor.pid or 0, signal.SIGTERM)  # else uvicorn restarts this worker forever
    raise SettingsError(
        f"{CANNOT_START} with {workers} workers: it must be one process, because /metrics "
        "shows only one process. Start it with `python -m app`, without --workers and "
        "WEB_CONCURRENCY; for more throughput, run more pods or containers."
    )
