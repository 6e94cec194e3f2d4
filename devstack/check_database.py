"""Report the obstacles to migrating a database, without changing it.

The environment variable DATABASE_URL names the database. The exit status is 1 if there is an
obstacle, or if the database could not be checked.
"""

import argparse
import os
import sys

import psycopg

from devstack.postgres import SUPABASE_DIRECTORY


def main() -> None:
    """Run the check of the first migration and print its result."""
    argparse.ArgumentParser(
        prog="DATABASE_URL=... make check-database", description=__doc__
    ).parse_args()
    # Not an argument: other users of the machine can read arguments, and the URL has a password.
    url = os.environ.get("DATABASE_URL")
    if not url:
        sys.exit("Set DATABASE_URL: DATABASE_URL=postgresql://... make check-database")
    (file,) = (SUPABASE_DIRECTORY / "migrations").glob("*_check.sql")
    # Only the block, without the statements around it that begin a transaction and create a schema.
    _, check, _ = file.read_text().split("$check$")
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            connection.read_only = True
            connection.execute(f"do $check${check}$check$".encode())
            connection.rollback()
    except psycopg.errors.ObjectNotInPrerequisiteState as stopped:
        sys.exit(stopped.diag.message_primary)
    except psycopg.Error as error:
        sys.exit(f"The database could not be checked: {str(error).strip()}")
    print("No obstacles: the migrations can be applied.")


if __name__ == "__main__":
    main()
