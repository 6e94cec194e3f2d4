"""Start the payment service."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

from app.server.server import serve


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Start the payment service. It reads its settings from the environment and "
        "from .env; docs/configuration.md describes them.",
    )
    parser.add_argument("--host", help="address to listen on (default: all, IPv4 and IPv6)")
    parser.add_argument("--port", type=_port, default=8002, help="port (default: %(default)s)")
    parser.add_argument(
        "--root-path",
        default="",
        help="path prefix that a proxy removes, such as /pay; /docs also works without this option",
    )
    options = parser.parse_args(arguments)
    with suppress(KeyboardInterrupt):
        serve("app.main:app", options.host, options.port, options.root_path)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; use 0 to 65535")
    return int(text)


if __name__ == "__main__":
    main()
