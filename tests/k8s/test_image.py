"""The image holds the service and its requirements, and nothing else."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def instructions() -> list[tuple[str, str]]:
    """Read the Dockerfile: its instructions and their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_both_stages_stand_on_the_slim_image() -> None:
    assert [stage.split()[0] for stage in arguments("FROM")] == ["python:3.11-slim"] * 2


def test_only_the_service_and_its_requirements_are_copied() -> None:
    copied = [line for line in arguments("COPY") if not line.startswith("--from=build")]
    assert copied == ["requirements.txt .", "app app"]


def test_the_build_sees_only_what_it_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules == ["*", "!app", "!requirements.txt", "**/__pycache__"]


def test_the_user_is_a_number_and_not_root() -> None:
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_command_is_in_exec_form_and_starts_the_service() -> None:
    (command,) = arguments("CMD")
    assert json.loads(command)[:2] == ["uvicorn", "app.main:app"]


def test_every_requirement_has_one_version() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.match(r"[A-Za-z0-9_.-]+==[0-9][^ ]*(  # .+)?$", line), line
