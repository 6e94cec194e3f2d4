"""Documents: their links resolve, and each command is run by a test or says what it needs."""

import re
from pathlib import Path

import pytest
import yaml
from documents import COMMAND_LANGUAGES, DOCUMENTS, REQUEST_LIMITS, ROOT, blocks, name_of, prose

import app
from app.errors import PROBLEMS
from app.ledger.user_limits import WAITING_OF_USER_MAX
from app.main import create_app
from app.server import protocol
from app.settings import Settings

README = ROOT / "README.md"
API = ROOT / "docs" / "api.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
README_LINES_MAX = 250
NEEDS = ("a cluster", "a Supabase project", "Docker", "the internet", "ten minutes")

LIMITS = {
    **REQUEST_LIMITS,
    "pipelined requests of a connection": f"{protocol.PIPELINED_MAX}",
    "connections": f"{protocol.CONNECTIONS_MAX:,}, "
    f"and {protocol.RESERVED_CONNECTIONS_MAX} more for "
    + "`{}`, `{}` and `{}`".format(*protocol.PROBE_PATHS),
    "waiting debits of one user": f"{WAITING_OF_USER_MAX}",
    "waiting debits": "`DEBITS_WAITING_MAX`",
}


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(document)):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_is_run_by_a_test_or_says_what_it_needs(document: Path) -> None:
    for block in blocks(document):
        if block.language not in COMMAND_LANGUAGES:
            continue
        needed = re.fullmatch(r"<!-- needs (.+) -->", block.line_above)
        run_by = re.fullmatch(r"<!-- run by (tests/\S+\.py) -->", block.line_above)
        assert needed or run_by, f"Put a mark above this block:\n{block.text}"
        if needed:
            assert needed[1] in NEEDS
        if run_by:
            assert document.name in (ROOT / run_by[1]).read_text(), run_by[1]


def test_the_readme_links_to_every_document() -> None:
    assert len(README.read_text().splitlines()) < README_LINES_MAX
    links = re.findall(r"\]\(([\w/.]+)", README.read_text())
    for document in DOCUMENTS:
        assert document == README or name_of(document) in links


def test_the_routes_and_functions_in_the_picture_of_the_readme_exist() -> None:
    (picture,) = [block.text for block in blocks(README) if block.language == "mermaid"]
    routes = {(method, path) for path, methods in routes_of_the_service() for method in methods}
    for method, path in re.findall(r"\b(GET|POST) (/[\w/{}]+)", picture):
        assert (method, path) in routes or path == "/items/{id}"
    migrations = "".join(path.read_text() for path in (ROOT / "supabase").rglob("*.sql"))
    functions = re.findall(r"\b(debit_\w+|find_\w+)", picture)
    assert len(functions) == 3
    for name in functions:
        assert f"create or replace function public.{name}(" in migrations


def routes_of_the_service() -> list[tuple[str, set[str]]]:
    return [
        (getattr(route, "path", ""), getattr(route, "methods", None) or set())
        for route in create_app().routes
    ]


def section(document: Path, heading: str) -> str:
    return document.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("document", "heading"), [(README, "API"), (API, "Other endpoints")])
def test_the_documented_paths_exist(document: Path, heading: str) -> None:
    paths = {path for path, _ in routes_of_the_service()}
    documented = re.findall(r"`(?:GET |POST )?(/[\w/.{}]+)[^`]*`", section(document, heading))
    assert len(documented) > 5
    assert set(documented) <= paths


def test_the_readme_says_of_each_problem_whether_the_user_was_charged() -> None:
    table: dict[str, str] = {}
    for row in re.findall(r"^\|.*\|$", section(README, "Errors"), re.MULTILINE)[2:]:
        _, codes, charged = (cell.strip() for cell in row.strip("|").split("|"))
        # The text after "no" is about earlier requests.
        table |= dict.fromkeys(re.findall(r"`(\w+)`", codes), charged.partition(";")[0])
    assert table == {code: problem.money_moved for code, problem in PROBLEMS.items()}


def test_the_documented_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", section(API, "Limits"), re.MULTILINE)
    assert dict(rows[2:]) == LIMITS


def test_the_documented_variables_are_the_settings_with_their_defaults() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \|", section(CONFIGURATION, "Variables"), re.MULTILINE
    )
    documented = dict(rows)
    assert sorted(documented) == sorted(name.upper() for name in Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = documented[name.upper()]
        assert ("required" in default) == field.is_required()
        value = re.fullmatch(r"`(.+)`", default)
        assert bool(value) == (not field.is_required() and field.default not in (None, ()))
        if value:
            assert str(field.default).removesuffix(".0").casefold() == value[1].casefold()


def test_the_required_variables_of_the_readme_are_the_required_settings() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", section(README, "Configuration"), re.MULTILINE)
    required = [name for name, field in Settings.model_fields.items() if field.is_required()]
    assert documented == [name.upper() for name in required]


def test_the_kubectl_commands_of_the_readme_are_those_of_the_guide() -> None:
    guide = ROOT / "docs" / "kubernetes.md"
    commands = re.sub(r"\s*\\\n\s*", " ", "".join(block.text for block in blocks(guide)))
    (block,) = [block for block in blocks(README) if block.text.startswith("kubectl ")]
    for command in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
        assert command in commands


def test_the_files_in_the_contributing_guide_exist() -> None:
    paths = re.findall(
        r"`((?:app|bench|devstack|docs|tests|k8s|supabase)/[\w./*]+)`", prose(CONTRIBUTING)
    )
    assert len(paths) > 20
    for path in paths:
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_documented_make_target_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^ *)make ([a-z-]+)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target


def test_the_newest_release_of_the_changelog_is_the_version_of_the_service() -> None:
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", app.__version__]


def recipe(target: str) -> list[str]:
    """Return the commands of a target of the Makefile."""
    found = re.search(
        rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert found
    return found[1].replace("$(BIN)", ".venv/bin").replace("\t", "").splitlines()


def test_pre_commit_runs_what_make_lint_and_make_types_run() -> None:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = configuration["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == [*recipe("lint"), *recipe("types")]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False


def test_the_workflow_runs_the_same_checks_as_ci_run_and_pins_its_actions() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    for step in job["steps"]:
        assert "uses" not in step or re.search(r"@v\d", step["uses"])


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_an_issue_form_is_valid(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    if form.name == "config.yml":
        return
    assert {"name", "description", "body"} <= content.keys()
    for field in content["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert "value" in field["attributes"] or "label" in field["attributes"]
