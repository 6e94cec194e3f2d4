"""Draw the Grafana dashboard with data: Prometheus, two services, and a minute of light load."""

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import httpx
import psycopg

from bench.browser import running_chromium
from bench.panels import HEIGHT, WIDTH, Panel, Series, draw_dashboard
from bench.png import with_palette
from bench.processes import ROOT, BenchFailed, await_response, free_ports, running_program
from bench.stack import FIRST_USER, ITEMS, SERVICE, Stack, item_id, running_server, running_stack
from devstack.postgres import database_url

DASHBOARD = ROOT / "k8s" / "monitoring" / "grafana" / "dashboard.json"
PODS = ("payment-service-1", "payment-service-2")
SCRAPE_SECONDS = 1
RATE_RANGE = "10s"
DEBITS_PER_SECOND_MAX = 80
CROWD = 100  # debits that arrive at once, halfway
POOR_USER = 1
RANDOM = random.Random(1)  # noqa: S311 - it spreads load and protects nothing


@contextmanager
def running_prometheus(folder: Path, ports: dict[str, int]) -> Iterator[str]:
    """Run Prometheus with the labels of a cluster until the block ends; yield its address."""
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "payment-service", "pod": pod}}
        for pod, port in ports.items()
    ]
    config = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "payment-service", "static_configs": targets}],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    [port] = free_ports(1)
    command = (
        "prometheus",
        f"--config.file={folder / 'prometheus.json'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    with running_program(*command) as process:
        url = f"http://127.0.0.1:{port}"
        await_response(f"{url}/-/ready", process)
        yield url


class Load:
    """Debits, declines, replays and look-ups at a rate that rises and falls once."""

    def __init__(self, ports: list[int], seconds: float) -> None:
        self._urls = [f"http://127.0.0.1:{port}/payments" for port in ports]
        self._seconds = seconds
        self._previous: tuple[dict[str, object], str] | None = None

    def run(self) -> None:
        """Send the requests, and return after the last response."""
        asyncio.run(self._send())

    async def _send(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            asyncio.TaskGroup() as tasks,
        ):
            started = time.monotonic()
            crowd_is_due = True
            while (elapsed := time.monotonic() - started) < self._seconds:
                tasks.create_task(self._request(session))
                if crowd_is_due and elapsed > self._seconds / 2:
                    crowd_is_due = False
                    for _ in range(CROWD):
                        tasks.create_task(self._request(session))
                share = math.sin(math.pi * elapsed / self._seconds) ** 2
                await asyncio.sleep(1 / (5 + share * DEBITS_PER_SECOND_MAX))

    async def _request(self, session: aiohttp.ClientSession) -> None:
        url = RANDOM.choice(self._urls)
        user_id = FIRST_USER + RANDOM.randrange(1000)
        body: dict[str, object] = {"user_id": user_id, "item_id": item_id(RANDOM.randrange(ITEMS))}
        key = str(uuid4())
        kind = RANDOM.random()
        if kind < 0.05:
            body["user_id"] = POOR_USER
        elif kind < 0.08:
            body["expected_price"] = 1_000_000
        elif kind < 0.10:
            body["item_id"] = str(uuid4())
        elif kind < 0.15 and self._previous:
            body, key = self._previous
        elif kind < 0.18:
            query = f"?user_id={user_id}&idempotency_key={key}"
            async with session.get(f"{url}/outcome{query}"):
                return
        self._previous = body, key
        async with session.post(f"{url}/debit", json=body, headers={"Idempotency-Key": key}):
            pass


def read_panels(prometheus: str, seconds: int) -> list[Panel]:
    """Run the queries of the dashboard for the last seconds."""
    end = time.time()
    panels = []
    with httpx.Client(base_url=f"{prometheus}/api/v1", trust_env=False) as client:
        for definition in json.loads(DASHBOARD.read_text())["panels"]:
            series = [
                found
                for target in definition.get("targets", [])
                for found in _query(client, target, end, seconds)
            ]
            panels.append(Panel(definition, series))
    return panels


def _query(client: httpx.Client, target: dict[str, str], end: float, seconds: int) -> list[Series]:
    query = (
        target["expr"]
        .replace("$namespace", "payment-service")
        .replace("$__rate_interval", RATE_RANGE)
        .replace("$__range", f"{seconds}s")
    )
    times = {"start": end - seconds, "end": end, "step": SCRAPE_SECONDS}
    response = client.get("/query_range", params={"query": query, **times})
    results: list[dict[str, Any]] = response.raise_for_status().json()["data"]["result"]
    return [
        Series(
            _legend(target.get("legendFormat", ""), result["metric"]),
            [(float(at) - end + seconds, float(value)) for at, value in result["values"]],
        )
        for result in results
    ]


def _legend(template: str, labels: dict[str, str]) -> str:
    if not template:
        return " ".join(labels.values())
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def write_picture(svg: str, file: Path) -> None:
    """Let Chromium draw SVG text into a PNG file.

    Raises:
        BenchFailed: Chromium is missing.
    """
    with running_chromium() as chromium:
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_content(f'<body style="margin:0">{svg}</body>')
        file.write_bytes(with_palette(page.screenshot()))


def collect(seconds: int) -> list[Panel]:
    """Run the stack, the load and Prometheus; return the panels with their data."""
    with ExitStack() as context:
        stack = context.enter_context(running_stack())
        _add_poor_user(stack)
        servers = [context.enter_context(running_server(SERVICE, stack)) for _ in PODS]
        ports = dict(zip(PODS, (server.port for server in servers), strict=True))
        folder = Path(context.enter_context(tempfile.TemporaryDirectory()))
        prometheus = context.enter_context(running_prometheus(folder, ports))
        Load(list(ports.values()), seconds).run()
        return read_panels(prometheus, seconds)


def _add_poor_user(stack: Stack) -> None:
    with psycopg.connect(database_url(stack.postgres_port), autocommit=True) as connection:
        connection.execute(
            'insert into public."Users" (card_id, name) values (%s, %s)', (POOR_USER, "bench")
        )


def main() -> None:
    """Write the picture to the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.dashboard", description=__doc__)
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--seconds", type=int, default=60, help="length of the load (%(default)s)")
    arguments = parser.parse_args()
    try:
        write_picture(draw_dashboard(collect(arguments.seconds)), arguments.picture)
    except BenchFailed as error:
        parser.exit(1, f"bench.dashboard: {error}\n")


if __name__ == "__main__":
    main()
