"""Links in the documents lead to existing files and headings."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", prose(document))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_lists_every_document() -> None:
    for document in DOCUMENTS[1:]:
        assert f"`{document.name}`" in prose(DOCUMENTS[0])


def test_the_files_and_functions_of_a_debit_in_the_readme_exist() -> None:
    steps = prose(ROOT / "README.md").partition("One debit, step by step:")[2].partition("\n## ")[0]
    code = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    code += "".join(path.read_text() for path in (ROOT / "supabase").rglob("*.sql"))
    names = re.findall(r"`([\w./*]+)`", steps)
    assert len(names) > 20
    for name in names:
        is_file = (ROOT / "app" / name).exists() or (ROOT / name).exists()
        definition = rf"\b(def|class|function) (public\.)?{re.escape(name)}\b"
        assert is_file or re.search(definition, code), name


def test_the_files_in_the_development_guide_exist() -> None:
    for pattern in re.findall(
        r"`((?:app|tests|k8s|supabase)/[\w./*]+)`", prose(ROOT / "docs/development.md")
    ):
        assert list(ROOT.glob(pattern)), pattern
