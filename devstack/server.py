"""One server of the dev stack, in a process of its own that ends when the stack does."""

import argparse
import os
import signal
import threading

import uvicorn
from starlette.types import ASGIApp

from app.__main__ import main as start_service
from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import database_url
from devstack.products import create_products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["gateway", "products", "service"])
    parser.add_argument("port", type=int)
    parser.add_argument("postgres_port", type=int)
    arguments = parser.parse_args()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if arguments.name == "service":
        start_service(["--host", "127.0.0.1", "--port", str(arguments.port)])
        return
    uvicorn.run(
        _application(arguments.name, arguments.postgres_port),
        host="127.0.0.1",
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=20,
        timeout_keep_alive=75,
        server_header=False,
    )


def _application(name: str, postgres_port: int) -> ASGIApp:
    if name == "gateway":
        return create_gateway(database_url(postgres_port, role="authenticator"), JWT_SECRET)
    return create_products(database_url(postgres_port))


def _stop_with_parent() -> None:
    """Wait for the end of standard input, which comes when the parent ends, however it ends."""
    # Not through sys.stdin: its lock would be held when the interpreter ends, which aborts then.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
