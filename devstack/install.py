"""Create .venv, install the requirements and show the progress of pip.

It runs before anything is installed, so it uses only the standard library. A file in .venv marks a
completed installation; make compares its time with the time of the requirements.
"""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

VENV = Path(".venv")
MARK = VENV / "installed"
REQUIREMENTS = "requirements-dev.lock"
# A user's pip configuration may contain --user, which fails in a virtual environment.
ENVIRONMENT = os.environ | {
    "PIP_USER": "0",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
}

SECONDS_BETWEEN_LINES = {True: 0.2, False: 5.0}  # by whether the output is a terminal


class Progress:
    """Progress of pip, read from its output and from the installed packages."""

    def __init__(self, first_step: str) -> None:
        self.first_step = first_step
        self.fetched = 0
        self.total = 0
        self.before = _count_installed()
        self.current = ""
        self.ended = threading.Event()

    def read(self, line: str) -> None:
        """Update the progress from a line of the output."""
        if found := re.match(r"Collecting ([\w.-]+)", line):
            self.fetched += 1
            self.current = f": {found[1]}"
        elif line.startswith("Installing collected packages:"):
            self.total = line.count(",") + 1

    def show(self) -> None:
        """Print the progress repeatedly until pip has ended."""
        terminal = sys.stdout.isatty()
        start = "\r\033[K" if terminal else ""
        end = "" if terminal else "\n"
        while not self.ended.wait(SECONDS_BETWEEN_LINES[terminal]):
            text = f"  {self.fetched} packages downloaded{self.current}"
            if not self.fetched:
                text = f"  {self.first_step}"
            if self.total:
                installed = _count_installed() - self.before
                text = f"  {installed} of {self.total} packages installed"
            print(start + text, end=end, flush=True)
        print(start, end="", flush=True)


def main() -> int:
    """Create the environment; return the exit status of the first program that fails, or 0."""
    if importlib.util.find_spec("ensurepip") is None:
        print(
            f"{sys.executable} cannot create virtual environments. Install the module venv "
            "(Debian, Ubuntu: apt install python3-venv).",
            file=sys.stderr,
        )
        return 1
    print(f"Installing packages into {VENV}; the first time takes about a minute ...")
    # Without the mark, an earlier installation may have been interrupted; its files are deleted.
    clear = [] if MARK.exists() else ["--clear"]
    MARK.unlink(missing_ok=True)
    venv = [sys.executable, "-m", "venv", *clear, str(VENV)]
    created = _run(venv, Progress("creating the virtual environment"))
    if created != 0:
        return created
    pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check"]
    requirements = ["--require-hashes", "-r", REQUIREMENTS]
    installed = _run([*pip, "--progress-bar", "off", *requirements], Progress("starting pip"))
    if installed == 0:
        MARK.touch()
    return installed


def _run(command: list[str], progress: Progress) -> int:
    """Run a program and show its progress; print its output if it fails."""
    output: list[str] = []
    with subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        printer = threading.Thread(target=progress.show)
        printer.start()
        try:
            for line in process.stdout or ():
                output.append(line)
                progress.read(line)
        finally:
            progress.ended.set()
            printer.join()
    if process.returncode != 0:
        noise = ("Collecting ", "Requirement already", "Using cached ", "Downloading ")
        sys.stderr.writelines(line for line in output if not line.lstrip().startswith(noise))
    return process.returncode


def _count_installed() -> int:
    return len(list(VENV.glob("lib/python*/site-packages/*.dist-info/RECORD")))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Run make again to install the packages.")
    except OSError as error:
        sys.exit(f"The packages cannot be installed: {error}")
