"""Print the findings of public.audit_ledger(); the exit status is 1 if there are any.

The environment variable DATABASE_URL names the database; the default is the dev stack.
"""

import argparse
import os
import sys

import psycopg

from devstack.postgres import database_url

COUNTS_SQL = """
select
  (select count(*) from public."Users"),
  (select count(*) from public."Transaction_History"),
  (select coalesce(sum(balance), 0) from public."Users")
"""


def main() -> None:
    """Audit the database and print the result."""
    argparse.ArgumentParser(prog="python -m devstack.audit", description=__doc__).parse_args()
    # Not an argument: other users of the machine can read arguments, and the URL has a password.
    url = os.environ.get("DATABASE_URL") or database_url(54322)
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            info = connection.info
            audited = f"database {info.dbname} on {info.host}:{info.port}"
            # The function's own statement_timeout only works in calls through PostgREST.
            connection.execute("set statement_timeout = '10min'")
            faults = connection.execute("select * from public.audit_ledger()").fetchall()
            counts = connection.execute(COUNTS_SQL).fetchone()
    except psycopg.Error as error:
        # The URL may contain a password, so it is not printed.
        sys.exit(
            f"The ledger could not be audited: {str(error).strip()}\n"
            "Does DATABASE_URL name the database? Without it, make audit connects to the dev stack "
            "(make run). Are the migrations applied?"
        )
    for user_id, fault in faults:
        print(f"user {user_id}: {fault}")
    if faults:
        sys.exit(f"{len(faults)} faults in the ledger ({audited}).")
    users, entries, total = counts or (0, 0, 0)
    print(
        f"The ledger has no faults: {users} users, {entries} entries, total balance {total} "
        f"({audited})."
    )


if __name__ == "__main__":
    main()
