"""The names in docs/architecture.md, also those in its diagrams, are those of the code."""

import re
import tomllib
from pathlib import Path

import pytest
from documents import code_in

from app.api.schemas import Payment
from app.errors import PROBLEMS, KeyOfDebit
from app.main import create_app

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()
PYTHON = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
SQL = "".join(path.read_text() for path in (ROOT / "supabase").rglob("*.sql"))
DIAGRAMS = code_in(DOCUMENT, "mermaid")
PARTS, DEBIT, UNKNOWN_OUTCOME = DIAGRAMS

# Mermaid's own words at the start of a line of a sequence diagram.
SEQUENCE_LINE = re.compile(
    r"sequenceDiagram|participant \w+( as .+)?|Note over \w+: .+|(alt|else|loop) .+|end"
    r"|(\w+)(->>|-->>|--x)(\w+): .+"
)


def section(heading: str) -> str:
    return DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def is_defined(name: str) -> bool:
    """Return whether a function or a class of that name is in the service or the migrations."""
    definition = rf"\b(def|class|function) ((public|ledger)\.)?{re.escape(name)}\b"
    return re.search(definition, PYTHON + SQL) is not None


def is_file(name: str) -> bool:
    return (ROOT / name).exists() or (ROOT / "app" / name).exists()


def test_the_files_and_functions_of_a_debit_step_by_step_exist() -> None:
    steps = re.findall(r"^\d\. .+\n(?:   .+\n)*", section("One debit, step by step"), re.MULTILINE)
    assert len(steps) == 7
    names = re.findall(r"`([\w./]+)`", "".join(steps))
    assert len(names) > 20
    for name in names:
        assert is_file(name) or is_defined(name.removeprefix("ledger.")), name


@pytest.mark.parametrize("diagram", DIAGRAMS)
def test_the_functions_in_a_diagram_exist(diagram: str) -> None:
    functions = re.findall(r"(\w+)\(\)", diagram)
    assert functions
    for name in functions:
        assert is_defined(name), name


@pytest.mark.parametrize("diagram", DIAGRAMS)
def test_every_name_with_an_underscore_in_a_diagram_is_one_of_the_code(diagram: str) -> None:
    members = {*Payment.model_fields, *KeyOfDebit.model_fields}
    tables = set(re.findall(r'public\."(\w+)"', SQL))
    for name in re.findall(r"\b\w+_\w+\b", re.sub(r"app/[\w/.]+", "", diagram)):
        assert name in PROBLEMS or name in members or name in tables or is_defined(name), name


@pytest.mark.parametrize("diagram", DIAGRAMS)
def test_a_status_in_a_diagram_is_that_of_the_problem(diagram: str) -> None:
    for status, code in re.findall(r"\b(\d{3}) (\w+_\w+)", diagram):
        assert PROBLEMS[code].status == int(status)


@pytest.mark.parametrize("diagram", DIAGRAMS)
def test_the_paths_in_a_diagram_are_routes_or_folders(diagram: str) -> None:
    methods = {
        (method.upper(), path)
        for path, operations in create_app().openapi()["paths"].items()
        for method in operations
    }
    for method, path in re.findall(r"\b(GET|POST) (/[\w/{}]+)", diagram):
        assert (method, path) in methods or path == "/items/{id}", path
    for path in re.findall(r"\bapp/[\w/.]+", diagram):
        assert (ROOT / path).exists(), path


def test_the_diagram_of_the_parts_shows_the_tables_of_the_database() -> None:
    (tables,) = re.findall(r"Postgres:<br/>(.+)\"\)", PARTS)
    created = re.findall(r'create table if not exists public\."(\w+)" \(', SQL)
    assert re.findall(r"\w+", tables.replace("<br/>", " ")) == created


@pytest.mark.parametrize("diagram", [DEBIT, UNKNOWN_OUTCOME])
def test_a_sequence_diagram_uses_declared_participants_only(diagram: str) -> None:
    participants = set(re.findall(r"participant (\w+)", diagram))
    for line in diagram.splitlines():
        match = SEQUENCE_LINE.fullmatch(line.strip())
        assert match, line
        assert {match[3], match[5]} - {None} <= participants, line
    opened = len(re.findall(r"^ *(?:alt|loop) ", diagram, re.MULTILINE))
    assert opened == len(re.findall(r"^ *end$", diagram, re.MULTILINE))


def test_a_participant_with_a_file_is_a_class_of_that_file() -> None:
    participants = re.findall(r"participant \w+ as (\w+)<br/>(\S+)", DEBIT)
    assert len(participants) == 5
    for name, path in participants:
        assert f"\nclass {name}" in (ROOT / path).read_text(), name


def test_the_packages_are_those_of_the_service_in_the_order_of_imports() -> None:
    names = re.findall(r"^\| `([\w.]+)/?` \|", section("Packages"), re.MULTILINE)
    listed = [name.removesuffix(".py") for name in names]
    existing = {
        path.stem
        for path in (ROOT / "app").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(listed) == existing - {"__init__", "__main__"}
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = configuration["tool"]["importlinter"]["contracts"][0]["layers"]
    position = {
        name.strip(): number for number, layer in enumerate(layers) for name in layer.split("|")
    }
    assert listed == sorted(listed, key=lambda name: position[name])


def test_the_constants_in_the_decisions_have_these_values() -> None:
    constants = re.findall(r"`([A-Z_]+) = ([\d.]+)`", section("Decisions"))
    assert len(constants) > 3
    for name, value in constants:
        assert re.search(rf"^{name} = {re.escape(value)}\b", PYTHON, re.MULTILINE), name


def test_every_decision_says_what_why_what_was_rejected_and_what_was_measured() -> None:
    decisions = re.split(r"^### ", section("Decisions"), flags=re.MULTILINE)[1:]
    assert len(decisions) > 12
    for decision in decisions:
        labels = re.findall(r"^- \*\*(\w+):\*\*", decision, re.MULTILINE)
        assert labels == ["What", "Why", "Rejected", "Measured"], decision


def test_the_code_in_the_text_exists() -> None:
    prose = re.sub(r"^```.*?^```", "", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`([a-z]+_\w+)`", prose):
        assert name in PROBLEMS or is_defined(name), name
