"""What metrics, log and traces cost: the service with and without them, in turns."""

import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from starlette.types import Receive, Scope, Send

from bench.measurement import Bench, await_port, free_ports
from bench.stack import await_answer, process, server

ROUNDS = 5
PROFILE, CONNECTIONS = "users spread out", 128
AS_FAST_AS_SILENT_MIN = 0.9  # times, whatever of them is on


async def sink(scope: Scope, receive: Receive, send: Send) -> None:
    """Take spans as a collector does, and forget them."""
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Variant:
    """The service, saying more or less of what it does, and how it did under load."""

    def __init__(self, name: str, application: str, **settings: str) -> None:
        self.name = name
        self.application = application
        self.settings = settings
        self.per_second: list[float] = []
        self.microseconds: list[float] = []

    def start(self, bench: Bench, stack: ExitStack) -> None:
        (self._port,) = free_ports(1)
        gateway, products = bench.gateway_port, bench.products_port
        running = stack.enter_context(
            server(self.application, self._port, gateway, products, **self.settings)
        )
        await_answer(f"http://127.0.0.1:{self._port}/ready", running)
        self._process_id = running.pid

    def load(self, bench: Bench) -> None:
        bench.port = self._port
        before = processor_seconds(self._process_id)
        result = bench.load(self.name, PROFILE, CONNECTIONS, "service")
        seconds = processor_seconds(self._process_id) - before
        self.per_second.append(result.per_second)
        self.microseconds.append(seconds / result.done * 1e6)


def measure_observability(bench: Bench) -> None:
    """Load each variant in turns, and print how it compares with the one that says nothing."""
    (collector_port,) = free_ports(1)
    collector = f"http://127.0.0.1:{collector_port}"
    variants = [
        Variant("no metrics, no log", "bench.unobserved:app"),
        Variant("metrics", "app.main:app", LOG_LEVEL="WARNING"),
        Variant("metrics and log", "app.main:app"),
        Variant("metrics, log and traces", "app.main:app", OTEL_EXPORTER_OTLP_ENDPOINT=collector),
    ]
    silent = variants[0]
    with ExitStack() as stack:
        command = ("uvicorn", "bench.observability:sink", "--port", str(collector_port))
        stack.enter_context(process(*command, "--log-level", "warning"))
        await_port(collector_port)
        for variant in variants:
            variant.start(bench, stack)
        for number in range(ROUNDS):
            # Every second round backwards, so that none always comes after the same.
            for variant in variants if number % 2 else variants[::-1]:
                variant.load(bench)
    print(f"\nwhat it says, medians of {ROUNDS} rounds: times as fast, processor time a debit")
    for variant in variants:
        pairs = zip(variant.per_second, silent.per_second, strict=True)
        ratio = median(ours / theirs for ours, theirs in pairs)
        print(
            f"{variant.name:26}{ratio:8.2f}{median(variant.microseconds):8.0f} µs"
            f"{bench.verdict(ratio >= AS_FAST_AS_SILENT_MIN)}"
        )


def processor_seconds(process_id: int) -> float:
    """How long a process has used a processor, its own time and the kernel's for it."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
