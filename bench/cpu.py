"""CPU time of processes, read from /proc; see proc_pid_stat(5)."""

import os
from contextlib import suppress
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Indexes into the fields that follow the name of the program.
PARENT = 1
USER = 11
KERNEL = 12
ENDED_CHILDREN_USER = 13
ENDED_CHILDREN_KERNEL = 14


def cpu_seconds(process_id: int) -> float:
    """Return the CPU time that a process has used, in user mode and in the kernel."""
    fields = _read_fields(process_id)
    return (fields[USER] + fields[KERNEL]) / TICKS_PER_SECOND


def postgres_cpu_seconds(data_directory: Path) -> float:
    """Return the CPU time of all processes of a Postgres cluster, including ended processes."""
    postmaster = int((data_directory / "postmaster.pid").read_text().partition("\n")[0])
    fields = _read_fields(postmaster)
    ended = (fields[ENDED_CHILDREN_USER] + fields[ENDED_CHILDREN_KERNEL]) / TICKS_PER_SECOND
    running = 0.0
    for child in _children(postmaster):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
            running += cpu_seconds(child)
    return cpu_seconds(postmaster) + ended + running


def _children(parent: int) -> list[int]:
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        process_id = int(folder.name)
        with suppress(FileNotFoundError, ProcessLookupError):
            if _read_fields(process_id)[PARENT] == parent:
                children.append(process_id)
    return children


def _read_fields(process_id: int) -> list[int]:
    """Return the numbers of /proc/PID/stat; the state, a letter, becomes 0."""
    after_name = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2]
    _, *numbers = after_name.split()
    return [0, *map(int, numbers)]
