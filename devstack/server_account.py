"""The account that runs PostgreSQL, and folders that this account can enter.

PostgreSQL refuses to run as root, so root runs it as `nobody`. If `nobody` cannot enter the folder
of the data, for example in the home folder of root, a private folder below /var/lib is used.
"""

import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ACCOUNTS = ("nobody", "postgres", "daemon")
STATE_FOLDERS = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108 - the folder is checked before use
STATE_NAME = "payment-service-devstack"
ENTER = 1
READ = 4


class PostgresFailed(Exception):
    """PostgreSQL could not be set up or started; the message says why, and what to do."""


class PortRefused(PostgresFailed):
    """PostgreSQL cannot use its port; the message is the reason that the system gives."""


def server_account() -> pwd.struct_passwd | None:
    """Return the account that runs PostgreSQL for root; None if the user runs it directly."""
    if os.geteuid() != 0:
        with suppress(KeyError):
            pwd.getpwuid(os.geteuid())
            return None
        raise PostgresFailed(
            f"PostgreSQL does not run for user id {os.geteuid()}, because the id has no entry in "
            "/etc/passwd. Add an entry, or start as root or as a user with an entry."
        )
    for name in ACCOUNTS:
        with suppress(KeyError):
            if (account := pwd.getpwnam(name)).pw_uid != 0:
                return account
    raise PostgresFailed(
        f"PostgreSQL refuses to run as root, and none of the accounts {', '.join(ACCOUNTS)} "
        "exists. Create one of them, or start as another user."
    )


def can_enter(folder: Path, account: pwd.struct_passwd) -> bool:
    """Return whether the account can enter the folder and all its parents."""
    folder = folder.resolve()
    return all(_permits(path, account, ENTER) for path in (folder, *folder.parents))


def can_read_all(folder: Path, account: pwd.struct_passwd) -> bool:
    """Return whether the account can read everything in the folder."""
    return can_enter(folder, account) and all(
        _permits(path, account, READ | ENTER if path.is_dir() else READ)
        for path in folder.rglob("*")
    )


def _permits(path: Path, account: pwd.struct_passwd, right: int) -> bool:
    status = path.stat()
    shift = 0
    if status.st_uid == account.pw_uid:
        shift = 6
    elif status.st_gid == account.pw_gid:
        shift = 3
    return status.st_mode >> shift & right == right


def make_private_folder(
    data: Path, account: pwd.struct_passwd, bases: Sequence[Path] = STATE_FOLDERS
) -> Path:
    """Return the folder that replaces `data` for the account; create it if it is missing."""
    folder = _state_folder(account, bases) / _private_name(data)
    folder.mkdir(exist_ok=True)
    _grant_entry(folder, account)
    return folder


def remove_private_folders(data: Path) -> None:
    """Delete what `make_private_folder` created for `data`."""
    for base in STATE_FOLDERS:
        folder = base / STATE_NAME
        if folder.is_dir() and _is_safe(folder):
            shutil.rmtree(folder / _private_name(data), ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()  # fails if it contains the data of another checkout


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create a folder that PostgreSQL can enter; delete it at the end of the block."""
    account = server_account()
    base = Path(tempfile.gettempdir())
    if account and not can_enter(base, account):
        base = _state_folder(account, STATE_FOLDERS)
    with tempfile.TemporaryDirectory(prefix="payment-service-", dir=base) as name:
        folder = Path(name).resolve()
        if account:
            _grant_entry(folder, account)
        yield folder


def _private_name(data: Path) -> str:
    return hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:16]


def _grant_entry(folder: Path, account: pwd.struct_passwd) -> None:
    """Let root and the account's group enter a folder that this module created."""
    os.chown(folder, 0, account.pw_gid, follow_symlinks=False)
    folder.chmod(0o710)


def _state_folder(account: pwd.struct_passwd, bases: Sequence[Path]) -> Path:
    for base in bases:
        if not (base.is_dir() and os.access(base, os.W_OK) and can_enter(base, account)):
            continue
        folder = base / STATE_NAME
        with suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o711)
        if not _is_safe(folder):
            raise PostgresFailed(
                f"{folder} does not belong to root alone, so another user could change the data. "
                "Delete the folder."
            )
        return folder
    raise PostgresFailed(
        f"The account {account.pw_name}, which runs PostgreSQL for root, needs a folder below "
        f"{' or '.join(map(str, bases))}, but none can be created there. Start as another user."
    )


def _is_safe(folder: Path) -> bool:
    """Return whether root owns the folder and only root can create files in it."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and not status.st_mode & 0o022


if __name__ == "__main__":
    remove_private_folders(Path(".devstack"))  # for `make clean`
