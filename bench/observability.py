"""What metrics, log, traces and tokens cost: the service with and without them, in turns."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.types import Receive, Scope, Send

from bench.measurement import Bench, await_port, free_ports
from bench.stack import await_answer, process, server

ROUNDS = 5
KEY_ID = "bench"
PUBLISHED_KEYS = os.environ.get("PUBLISHED_KEYS", "").encode()  # of the process that is the sink
PROFILE, CONNECTIONS = "users spread out", 128
AS_FAST_AS_SILENT_MIN = 0.9  # times, whatever of them is on


async def sink(scope: Scope, receive: Receive, send: Send) -> None:
    """Take spans as a collector does, and forget them; publish a key as an issuer does."""
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": PUBLISHED_KEYS})


class Variant:
    """The service, saying more or less of what it does, and how it did under load."""

    def __init__(self, name: str, application: str, token: str = "", **settings: str) -> None:
        self.name = name
        self.application = application
        self.token = token
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
        bench.port, bench.token = self._port, self.token
        before = processor_seconds(self._process_id)
        result = bench.load(self.name, PROFILE, CONNECTIONS, "service")
        seconds = processor_seconds(self._process_id) - before
        self.per_second.append(result.per_second)
        self.microseconds.append(seconds / result.done * 1e6)


def measure_observability(bench: Bench) -> None:
    """Load each variant in turns, and print how it compares with the one that says nothing."""
    (sink_port,) = free_ports(1)
    sink_url = f"http://127.0.0.1:{sink_port}"
    keys, token = make_issuer()
    variants = [
        Variant("no metrics, no log", "bench.unobserved:app"),
        Variant("metrics", "app.main:app", LOG_LEVEL="WARNING"),
        Variant("metrics and log", "app.main:app"),
        Variant("metrics, log and traces", "app.main:app", OTEL_EXPORTER_OTLP_ENDPOINT=sink_url),
        Variant("metrics, log and tokens", "app.main:app", token, AUTH_JWKS_URL=sink_url),
    ]
    silent = variants[0]
    with ExitStack() as stack:
        command = ("uvicorn", "bench.observability:sink", "--port", str(sink_port))
        stack.enter_context(process(*command, "--log-level", "warning", PUBLISHED_KEYS=keys))
        await_port(sink_port)
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


def make_issuer() -> tuple[str, str]:
    """Make a key; returns what its issuer publishes, and a token that is valid for a day."""
    key = rsa.generate_private_key(65537, 2048)
    published = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": KEY_ID}
    claims = {"exp": int(time.time()) + 86_400, "scope": "payments"}
    token = jwt.encode(claims, key, "RS256", headers={"kid": KEY_ID})
    return json.dumps({"keys": [published]}), token


def processor_seconds(process_id: int) -> float:
    """How long a process has used a processor, its own time and the kernel's for it."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
