"""Run the service with metrics that do nothing, to measure the cost of metrics.

The arguments are those of `python -m app`.
"""

import runpy

from prometheus_client import Counter, Gauge, Histogram


def _do_nothing(*_: object) -> None:
    pass


if __name__ == "__main__":
    for kind, method in ((Counter, "inc"), (Gauge, "set"), (Histogram, "observe")):
        setattr(kind, method, _do_nothing)
    runpy.run_module("app", run_name="__main__", alter_sys=True)
