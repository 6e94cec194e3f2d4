"""Write down under which licence each package of the image comes, from its own metadata."""

import re
import sys
from importlib.metadata import PackageMetadata, metadata
from pathlib import Path

INTRODUCTION = """\
# Licences

What the image installs, and under which licence each package says that it comes. `make licences`
writes this page. `fastapi-offline` also carries the files of Swagger UI (Apache-2.0) and ReDoc
(MIT), which the service serves.

| package | version | licence |
| --- | --- | --- |
"""

TEXTS = {"httpx-aiohttp": "BSD-3-Clause"}  # it gives the text of its licence and not the name


def main() -> None:
    """Print the page for a file of requirements, all of them installed."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    packages = [line.partition("==")[0] for line in lines if re.match(r"[\w.-]+==", line)]
    sys.stdout.write(INTRODUCTION)
    for package in sorted(packages, key=str.lower):
        known = metadata(package)
        sys.stdout.write(f"| {package} | {known['Version']} | {read_licence(known)} |\n")


def read_licence(known: PackageMetadata) -> str:
    """Tell the licence: the expression of today's metadata, else what older packages give."""
    if "License-Expression" in known:
        return known["License-Expression"]
    classifiers = known.get_all("Classifier") or []
    names = [one.split(" :: ")[-1] for one in classifiers if one.startswith("License :: OSI")]
    return TEXTS.get(known["Name"]) or ", ".join(names) or known["License"]


if __name__ == "__main__":
    main()
