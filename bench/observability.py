"""The cost of metrics, logs, traces and tokens: the service with and without them, in turns."""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from starlette.types import Receive, Scope, Send

from bench.cpu import cpu_seconds
from bench.measurement import Bench
from bench.processes import await_port, free_ports, running_module
from bench.ratios import in_turns, ratio_of
from bench.stack import SERVICE, Program, running_server
from bench.wrk import SPREAD_OUT, Endpoint

ROUNDS = 5
KEY_ID = "bench"
PUBLISHED_KEYS = os.environ.get("PUBLISHED_KEYS", "").encode()  # set in the process of `sink`
CONNECTIONS = 128
RATIO_TO_SILENT_MIN = 0.9  # of debits/s, for each variant

UNOBSERVED = Program(("bench.unobserved", *SERVICE.arguments[1:]), SERVICE.ready_path)


async def sink(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond like a collector that discards spans, and like an issuer that publishes keys."""
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": PUBLISHED_KEYS})


@dataclass(frozen=True)
class Cost:
    """Debits/s as a ratio to the service without observability, and CPU time per debit."""

    name: str
    ratio: float
    microseconds: float


class Variant:
    """The service with a part of its observability, and its speed under load."""

    def __init__(
        self, name: str, program: Program = SERVICE, token: str = "", **settings: str
    ) -> None:
        self.name = name
        self.per_second: list[float] = []
        self.microseconds: list[float] = []
        self._program = program
        self._token = token
        self._settings = settings

    def start(self, bench: Bench, context: ExitStack) -> None:
        """Start the variant; it runs until the context ends."""
        server = running_server(self._program, bench.stack, self._settings)
        self._server = context.enter_context(server)

    def load(self, bench: Bench) -> None:
        """Measure the variant once."""
        endpoint = Endpoint(self._server.port, self._server.process_id, token=self._token)
        before = cpu_seconds(self._server.process_id)
        result = bench.load(self.name, endpoint, SPREAD_OUT, CONNECTIONS)
        seconds = cpu_seconds(self._server.process_id) - before
        self.per_second.append(result.per_second)
        self.microseconds.append(seconds / max(1, result.entries) * 1e6)


def measure_observability(bench: Bench) -> list[Cost]:
    """Measure the variants in turns; return the cost of each, relative to the first."""
    [sink_port] = free_ports(1)
    sink_url = f"http://127.0.0.1:{sink_port}"
    keys, token = create_issuer()
    variants = [
        Variant("no metrics, no log", UNOBSERVED, LOG_LEVEL="WARNING"),
        Variant("metrics", LOG_LEVEL="WARNING"),
        Variant("metrics and log"),
        Variant("metrics, log and traces", OTEL_EXPORTER_OTLP_ENDPOINT=sink_url),
        Variant("metrics, log and tokens", token=token, AUTH_JWKS_URL=sink_url),
    ]
    command = ("uvicorn", "bench.observability:sink", "--port", str(sink_port))
    with ExitStack() as context:
        context.enter_context(
            running_module(*command, "--log-level", "warning", PUBLISHED_KEYS=keys)
        )
        await_port(sink_port)
        for variant in variants:
            variant.start(bench, context)
        for number in range(ROUNDS):
            for variant in in_turns(variants, number):
                variant.load(bench)
    silent = variants[0].per_second
    return [
        Cost(
            variant.name, ratio_of(variant.per_second, silent).median, median(variant.microseconds)
        )
        for variant in variants
    ]


def create_issuer() -> tuple[str, str]:
    """Create a key; return its JWK set, and a token that is valid for a day."""
    key = rsa.generate_private_key(65537, 2048)
    published = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": KEY_ID}
    claims = {"exp": int(time.time()) + 86_400, "scope": "payments"}
    token = jwt.encode(claims, key, "RS256", headers={"kid": KEY_ID})
    return json.dumps({"keys": [published]}), token
