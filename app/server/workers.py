"""One process: several would each show a part of the metrics, and each have its own limits."""

import multiprocessing
import os
import re
import signal
import sys

from app.environment.variables import CANNOT_START, SettingsError

OPTION = re.compile(r"(?:--workers[= ]|-w ?)(\d+)(?: |$)")


def refuse_several_workers() -> None:
    """Stop the start if the server was told to run several worker processes.

    Raises:
        SettingsError: more than one.
    """
    told = [os.environ.get("WEB_CONCURRENCY", ""), *OPTION.findall(" ".join(sys.argv[1:]))]
    workers = max((int(count) for count in told if count.isdecimal()), default=1)
    if workers == 1:
        return
    if supervisor := multiprocessing.parent_process():
        os.kill(supervisor.pid or 0, signal.SIGTERM)  # uvicorn's would start the next one, forever
    raise SettingsError(
        f"{CANNOT_START} with {workers} workers: it is one process, because /metrics "
        "shows only one. Start it with `python -m app`, without --workers and WEB_CONCURRENCY; for "
        "more throughput, run more pods or containers."
    )
