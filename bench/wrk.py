"""Load from wrk, which runs load.lua."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.processes import BenchFailed, run_program
from devstack.keys import SERVICE_ROLE_KEY

SCRIPT = Path(__file__).parent / "load.lua"

SPREAD_OUT = "users spread out"
HOT_USER = "one hot user"
HOT_ITEM = "one hot item"
REPLAYS = "replays"
PROFILES = (SPREAD_OUT, HOT_USER, HOT_ITEM, REPLAYS)


@dataclass(frozen=True)
class Endpoint:
    """The target of debits: the API of a service, or the RPC of the gateway."""

    port: int
    process_id: int
    kind: Literal["service", "rpc"] = "service"
    token: str = ""  # bearer token of the requests to the service


@dataclass(frozen=True)
class Responses:
    """Responses that wrk counted, and latencies in milliseconds."""

    completed: int
    failed: int
    seconds: float
    p50: float
    p95: float
    p99: float


def run_wrk(
    endpoint: Endpoint, profile: str, connections: int, seconds: int, first_user: int
) -> Responses:
    """Send debits for some seconds over a number of connections.

    Raises:
        BenchFailed: wrk failed.
    """
    output = run_program(
        "wrk",
        "--threads=1",
        f"--connections={connections}",
        f"--duration={seconds}s",
        "--timeout=20s",
        f"--script={SCRIPT}",
        f"http://127.0.0.1:{endpoint.port}",
        PROFILE=profile,
        TARGET=endpoint.kind,
        KEY=SERVICE_ROLE_KEY,
        TOKEN=endpoint.token,
        SEED=str(connections),
        FIRST_USER=str(first_user),
    )
    return Responses(**json.loads(match_one(r"(?m)^RESULT (.*)$", output)))


def match_one(pattern: str, text: str) -> str:
    """Return the group of a pattern in a program's output.

    Raises:
        BenchFailed: the output does not match.
    """
    found = re.search(pattern, text)
    if found is None:
        raise BenchFailed(f"the output does not match {pattern}: {text}")
    return found[1]
