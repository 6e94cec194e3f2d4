"""A temporary checkout of a revision."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import ROOT, BenchFailed
from devstack.server_account import temporary_folder


def commit_of(revision: str, repository: Path = ROOT) -> str:
    """Return the commit that a revision names, such as HEAD~1, a tag or a short hash.

    Raises:
        BenchFailed: there is no such commit.
    """
    name = f"{revision}^{{commit}}"
    ended = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", name)
    if ended.returncode != 0:
        raise BenchFailed(f"{revision} is not a commit of this repository")
    return ended.stdout.strip()


@contextmanager
def worktree(commit: str, repository: Path = ROOT) -> Iterator[Path]:
    """Check a commit out into a temporary folder, and remove it at the end of the block."""
    with temporary_folder() as folder:
        checkout = folder / "checkout"
        try:
            added = _git(
                repository, "worktree", "add", "--detach", "--quiet", str(checkout), commit
            )
            if added.returncode != 0:
                raise BenchFailed(f"git worktree failed: {added.stderr.strip()}")
            yield checkout
        finally:
            # --force twice also removes a checkout whose creation was interrupted.
            _git(repository, "worktree", "remove", "--force", "--force", str(checkout))


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Do not run the hooks of the repository.
    command = ["git", "-C", str(repository), "-c", "core.hooksPath=/dev/null", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
