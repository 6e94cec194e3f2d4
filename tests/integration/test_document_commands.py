"""The commands of README.md, api.md, configuration.md and CONTRIBUTING.md, run as they stand there.

They run in a copy of the checkout, so that they change nothing in it. Only ports, the folder of the
data and placeholders are replaced.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from database import create_database
from dev_stack import assert_free, free_stack_ports, read_until_up
from documents import DOCUMENTS, ROOT, Block, blocks, name_of
from servers import await_health, free_port, without_coverage

from devstack.server_account import temporary_folder

MARK = "<!-- run by tests/integration/test_document_commands.py -->"
MARKED = [
    (document, block)
    for document in DOCUMENTS
    for block in blocks(document)
    if block.line_above == MARK
]
REQUESTS = [
    document
    for document in DOCUMENTS
    if any(d == document for d, b in MARKED if b.text.startswith("curl"))
]
# What differs from one response to the next.
VARYING = ("transaction_id", "created_at", "request_id")


def find_command(document: str, start: str) -> str:
    """Return the marked block of a document that starts with a command."""
    (text,) = [
        block.text.strip()
        for path, block in MARKED
        if name_of(path) == document and block.text.startswith(start)
    ]
    return text


MAKE_RUN = find_command("README.md", "make run")
CHECK_DATABASE = find_command("README.md", "DATABASE_URL=")
TEST_SERVICE = find_command("README.md", ".venv/bin/pytest")
COPY_ENV = find_command("docs/configuration.md", "cp ")
START = find_command("docs/configuration.md", ".venv/bin/python -m app")
ONE_TEST = find_command("CONTRIBUTING.md", ".venv/bin/pytest")
RUN_HERE = {MAKE_RUN, CHECK_DATABASE, TEST_SERVICE, COPY_ENV, START, ONE_TEST}


def test_every_marked_command_is_run_here() -> None:
    for _, block in MARKED:
        assert block.text.startswith("curl ") or block.text.strip() in RUN_HERE


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files of the checkout and its environment, without data and .env."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".env", ".devstack", ".git"):
            (folder / path.name).symlink_to(path)
    environment = folder / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (environment / path.name).symlink_to(path)
    (environment / "installed").touch()  # newer than the lists, so that make installs nothing
    return folder


def run(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=checkout,
        env=without_coverage() | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextmanager
def started(checkout: Path, command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command until the end of the block, as a terminal does that then gets Ctrl-C."""
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=checkout,
        env=without_coverage() | variables,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate()


@pytest.fixture(scope="module")
def address(checkout: Path) -> Iterator[str]:
    """Run the quick start; return the address of the service."""
    ports = free_stack_ports()
    with temporary_folder() as data:
        options = " ".join([f"--data {data}", *(f"{name} {port}" for name, port in ports.items())])
        with started(checkout, f'{MAKE_RUN} ARGS="{options}"') as stack:
            read_until_up(stack)
            yield f"http://localhost:{ports['--port']}"
    assert_free(ports)


def without_varying(body: dict[str, Any]) -> dict[str, Any]:
    return body | dict.fromkeys(VARYING & body.keys())


@pytest.mark.parametrize("document", REQUESTS, ids=name_of)
def test_the_requests_of_a_document_get_the_documented_responses(
    checkout: Path, address: str, document: Path
) -> None:
    all_blocks = blocks(document)
    following: list[Block | None] = [*all_blocks[1:], None]
    previous = ""
    for block, response in zip(all_blocks, following, strict=True):
        if not block.text.startswith("curl ") or block.line_above != MARK:
            continue
        ended = run(checkout, block.text.replace("http://localhost:8002", address))
        assert ended.returncode == 0, ended.stderr
        if response and response.language == "json":
            received = without_varying(json.loads(ended.stdout))
            assert received == without_varying(json.loads(response.text))
        else:  # a status, or "the response is the same"
            assert '"status":' in ended.stdout or ended.stdout == previous
        previous = ended.stdout


def test_the_check_of_a_database_finds_no_obstacle_in_an_empty_one(
    checkout: Path, postgres_port: int
) -> None:
    url = create_database(postgres_port, "not_migrated_yet")
    ended = run(checkout, CHECK_DATABASE.replace("postgresql://...", url))
    assert ended.returncode == 0, ended.stderr
    assert "No obstacles" in ended.stdout


@pytest.mark.parametrize(
    "command", [f"{TEST_SERVICE} -k user_not_found", ONE_TEST], ids=["README", "CONTRIBUTING"]
)
def test_the_documented_test_command_passes(checkout: Path, command: str) -> None:
    ended = run(checkout, command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"[1-9]\d* passed", ended.stdout)


def test_the_service_starts_with_a_copy_of_the_example_file(
    checkout: Path, gateway_url: str
) -> None:
    assert run(checkout, COPY_ENV).returncode == 0
    assert (checkout / ".env").read_text() == (ROOT / ".env.example").read_text()
    port = free_port()
    command = f"{START.partition('#')[0].strip()} --port {port}"
    with started(checkout, command, SUPABASE_URL=gateway_url):
        await_health(f"http://127.0.0.1:{port}")
