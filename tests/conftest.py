"""Fixtures that tests share: Postgres, the gateway, the products service and the service."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import psycopg
import pytest
from client import connect
from database import Database, drop_databases
from hypothesis import Phase, settings
from issuer import Issuer
from servers import free_port, make_settings, served

from app.ledger.client import CALL_TIMEOUT_SECONDS
from app.main import create_app
from devstack.gateway import create_gateway
from devstack.keys import JWT_SECRET
from devstack.postgres import apply_migrations, database_url, running_postgres
from devstack.products import create_products
from devstack.server_account import temporary_folder

# For `make mutants`, which only needs to know whether a property fails: no shrinking.
settings.register_profile(
    "mutants", phases=[Phase.explicit, Phase.generate], database=None, derandomize=True
)


POSTGRES_PARAMETERS = (
    # The data is temporary; writing hundreds of databases to disk takes a minute.
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "jit=off",  # Debian's PostgreSQL 15 would compile catalog queries repeatedly
)

# The slowest files start first, so that the workers finish at about the same time.
LONG_FILES = (
    "test_simulation.py",
    "test_existing_databases.py",
    "test_monitoring.py",
    "test_processes.py",
    "test_fault_table.py",
    "test_devstack.py",
    "test_devstack_folders.py",
    "test_settings.py",
    "test_sequential.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return  # a single process keeps the order of the command line
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def postgres_port() -> Iterator[int]:
    """Run a server with an empty database, outside pytest's folder, which only root can enter."""
    port = free_port()
    with (
        temporary_folder() as folder,
        running_postgres(folder / "postgres", port, *POSTGRES_PARAMETERS),
    ):
        yield port


@pytest.fixture(scope="session")
def migrated_port(postgres_port: int) -> int:
    apply_migrations(database_url(postgres_port))
    return postgres_port


@pytest.fixture(scope="session")
def database_session(migrated_port: int) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database_url(migrated_port), autocommit=True) as connection:
        yield connection


@pytest.fixture
def database(database_session: psycopg.Connection) -> Database:
    return Database(database_session)


@pytest.fixture(scope="session")
def gateway_url(migrated_port: int) -> Iterator[str]:
    gateway = create_gateway(database_url(migrated_port, role="authenticator"), JWT_SECRET)
    with served(gateway) as url:
        yield url


@pytest.fixture(scope="session")
def products_url(migrated_port: int) -> Iterator[str]:
    with served(create_products(database_url(migrated_port))) as url:
        yield url


@pytest.fixture(scope="session")
def service(gateway_url: str, products_url: str) -> Iterator[httpx.Client]:
    """Return a client of the payment service, which has real dependencies and no item cache."""
    settings = make_settings(
        supabase_url=gateway_url, products_service_url=products_url, products_cache_seconds=0
    )
    with served(create_app(settings)) as url, connect(url) as client:
        yield client


@pytest.fixture
def start_service(gateway_url: str, products_url: str) -> Iterator[Callable[..., httpx.Client]]:
    """Start services with other dependencies or settings."""
    with ExitStack() as stack:

        def start(
            *, call_timeout_seconds: float = CALL_TIMEOUT_SECONDS, **changes: object
        ) -> httpx.Client:
            real = {"supabase_url": gateway_url, "products_service_url": products_url}
            settings = make_settings(**(real | changes))
            app = create_app(settings, call_timeout_seconds=call_timeout_seconds)
            url = stack.enter_context(served(app))
            return stack.enter_context(connect(url))

        yield start


@pytest.fixture(autouse=True)
def _drop_databases_of_the_test() -> Iterator[None]:
    yield
    drop_databases()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer
