"""Run the service with metrics that count nothing, to measure what metrics cost.

It takes the arguments of `python -m app`.
"""

import runpy

from prometheus_client import Counter, Gauge, Histogram


def _nothing(*_: object) -> None:
    pass


if __name__ == "__main__":
    for kind, method in ((Counter, "inc"), (Gauge, "set"), (Histogram, "observe")):
        setattr(kind, method, _nothing)
    runpy.run_module("app", run_name="__main__", alter_sys=True)
