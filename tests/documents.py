"""The Markdown files of the project, and the commands in them."""

import re
from pathlib import Path
from typing import NamedTuple

from app.api import middleware, requests
from app.server import protocol

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_LANGUAGES = ("sh", "bash", "sql", "promql")
KIB = 1024
# The rows about a request in the tables of limits in api.md and security.md.
REQUEST_LIMITS = {
    "request line and headers": f"{protocol.HEAD_BYTES_MAX // KIB} KiB, "
    f"{protocol.HEADERS_MAX} headers, {protocol.HEAD_SECONDS_MAX:.0f} s",
    "address": f"{protocol.ESCAPES_MAX:,} percent-encoded characters",
    "query": f"{middleware.QUERY_BYTES_MAX // KIB} KiB, {middleware.PARAMETERS_MAX} parameters",
    "body": f"{requests.BODY_BYTES_MAX // KIB} KiB, {requests.FIELDS_MAX} fields, "
    f"{requests.BODY_SECONDS_MAX:.0f} s",
}


class Block(NamedTuple):
    """A code block: its language, its text without indentation, and the line above it."""

    language: str
    text: str
    line_above: str


def name_of(document: Path) -> str:
    """Return the path of a document in the checkout."""
    return str(document.relative_to(ROOT))


def prose(document: Path) -> str:
    """Return the text of a document without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[Block]:
    """Return the code blocks of a document."""
    return blocks_of(document.read_text())


def code_in(text: str, language: str) -> list[str]:
    """Return the code blocks of a language in a piece of Markdown."""
    return [block.text for block in blocks_of(text) if block.language == language]


def blocks_of(text: str) -> list[Block]:
    """Return the code blocks in a piece of Markdown."""
    pattern = r"^(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$"
    return [
        Block(
            found["language"],
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
            found["above"].strip(),
        )
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]
