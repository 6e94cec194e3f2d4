"""docs/security.md: its SQL and commands work, and its limits match the code."""

import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from database import Database, create_database
from documents import REQUEST_LIMITS, code_in

from app.auth.issuer_keys import KEYS_BYTES_MAX
from app.ledger import user_limits
from app.ledger.client import RESPONSE_BYTES_MAX as LEDGER_RESPONSE_BYTES_MAX
from app.products.client import ITEM_BYTES_MAX
from app.server import protocol
from app.telemetry import tracing
from devstack.postgres import apply_migrations

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
KIB = 1024

LIMITS = {
    **REQUEST_LIMITS,
    "trailers of a chunked body": f"{protocol.HEAD_BYTES_MAX // KIB} KiB, "
    f"{protocol.HEADERS_MAX}; they are ignored",
    "pipelined requests": f"{protocol.PIPELINED_MAX}, then the service stops reading",
    "responses that the caller does not read": f"{protocol.WRITE_SECONDS_MAX:.0f} s without "
    "progress",
    "connections": f"{protocol.CONNECTIONS_MAX:,}, and "
    f"{protocol.RESERVED_CONNECTIONS_MAX} more for probes",
    "debits of one user that wait": f"{user_limits.WAITING_OF_USER_MAX}",
    "debits that wait": "`DEBITS_WAITING_MAX`",
    "traces": f"{tracing.TRACES_PER_SECOND_MAX} a second",
    "responses of dependencies": f"{ITEM_BYTES_MAX // KIB} KiB, {KEYS_BYTES_MAX // KIB} KiB and "
    f"{LEDGER_RESPONSE_BYTES_MAX // KIB**2} MiB after decompression",
}


def test_the_documented_limits_match_the_code() -> None:
    section = TEXT.partition("\n## Limits\n")[2].partition("\nProcessor time")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]*\|$", section, re.MULTILINE)
    assert dict(rows[2:]) == LIMITS


def test_the_documented_sql_runs(database: Database) -> None:
    statements = code_in(TEXT, "sql")
    assert statements
    for statement in statements:
        database.connection.execute(statement)


def test_the_documented_command_audits_the_database_at_the_address_that_it_reads(
    postgres_port: int, tmp_path: Path
) -> None:
    (command,) = [code for code in code_in(TEXT, "sh") if code.startswith("read ")]
    url = create_database(postgres_port, f"audited_{uuid4().hex}")
    apply_migrations(url)
    make = tmp_path / "make"  # without the installation that the real one may begin with
    make.write_text(f'#!/bin/sh\n[ "$*" = audit ] && exec {sys.executable} -m devstack.audit\n')
    make.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for address, status in ((url, 0), ("postgresql://127.0.0.1:1/postgres", 1)):
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            input=f"{address}\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == status, ended.stderr
        assert address not in ended.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", TEXT))))
def test_every_documented_make_target_exists(target: str) -> None:
    assert re.search(rf"(?m)^{target}:.*## ", (ROOT / "Makefile").read_text())


def test_every_secret_setting_has_a_row() -> None:
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    secrets = re.findall(r"^\| `(\w+)` \| \w+, secret \|", configuration, re.MULTILINE)
    assert len(secrets) == 2
    table = TEXT.partition("\n## Leaked keys and tokens\n")[2].partition("\n## ")[0]
    for name in secrets:
        assert f"\n| `{name}` | " in table
