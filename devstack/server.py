"""A server process of the dev stack, which stops when its parent process ends."""

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
    """Run the server that the command line names."""
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
    """Stop this process at the end of standard input, when the parent has exited or was killed."""
    # Not sys.stdin: this thread would still hold its lock at exit, which aborts the interpreter.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
