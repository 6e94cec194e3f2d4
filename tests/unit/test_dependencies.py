"""The lists of packages agree: what is asked for, what the image installs, what is documented."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LISTS = ("requirements", "requirements-dev", "requirements-tools", "requirements-checkov")
CLI = "supabase@3.1.0"
# Permissive ones, and Mozilla's, which binds only whoever changes the package's own files.
LICENCES = {
    "3-Clause BSD License",
    "Apache Software License",
    "Apache-2.0",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "MIT",
    "MIT License",
    "MIT-0",
    "MPL 2.0",
    "MPL-2.0",
    "Mozilla Public License 2.0 ",
    "PSF-2.0",
    "Python Software Foundation License",
}


def versions(name: str) -> dict[str, str]:
    """Read the versions from a file of requirements, by the package's normalized name."""
    text = (ROOT / name).read_text()
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^ \n]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pins}


def test_the_lock_file_matches_the_requirements() -> None:
    assert versions("requirements.lock") == versions("requirements.txt"), "make lock"


def test_every_locked_package_has_hashes() -> None:
    for name in LISTS:
        lock = (ROOT / f"{name}.lock").read_text()
        assert "://" not in lock
        entries = re.split(r"^(?=\w)", lock, flags=re.MULTILINE)[1:]
        assert len(entries) >= len(versions(f"{name}.txt"))
        for entry in entries:
            assert re.fullmatch(
                r"[\w.-]+==[\w.]+( ; [^\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry
            ), entry


def test_tools_are_locked_at_the_required_version() -> None:
    for name in LISTS:
        asked = versions(f"{name}.txt").items()
        assert asked <= versions(f"{name}.lock").items(), "make lock"
    makefile, installer = (
        (ROOT / "Makefile").read_text(),
        (ROOT / "devstack/install.py").read_text(),
    )
    assert "requirements-$*.txt" not in makefile
    assert makefile.count("--require-hashes -r") == installer.count('"--require-hashes"') + 1


def test_the_documents_use_one_version_of_the_supabase_cli() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = [name for page in pages for name in re.findall(r"npx (\S+)", page.read_text())]
    assert len(named) > 5
    assert set(named) == {CLI}


def test_every_tool_is_pinned() -> None:
    for name in LISTS:
        for line in (ROOT / f"{name}.txt").read_text().splitlines():
            pinned = re.match(r"[\w.\[\]-]+==[\w.]+(  # .+)?$", line)
            assert pinned or line.startswith(("#", "-r ")) or not line, f"{name}: {line}"


def test_the_licences_are_documented_and_permissive() -> None:
    table = (ROOT / "docs" / "licences.md").read_text().partition("\n|")[2]
    command = [sys.executable, "-m", "piplicenses", "--format", "markdown", "--packages"]
    packages = versions("requirements.txt").keys() - {"httpx-aiohttp"}  # the page says why
    command += sorted(packages)
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"|{table}" == written, "make licences"
    found = re.findall(r"^\| [\w.-]+ +\| [0-9][\w.]* +\| (.+?) +\|$", table, re.MULTILINE)
    assert len(found) == len(packages)
    for licence in found:
        assert set(re.split(r" AND | OR |; |, |[()]", licence)) - {"", " "} <= LICENCES
