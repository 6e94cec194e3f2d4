"""Rules for the text of the migrations, so that they also run on Citus (docs/scaling.md)."""

import re
from pathlib import Path

import pytest

MIGRATIONS = Path(__file__).parents[2] / "supabase" / "migrations"
# The first file only checks. Its messages contain statements.
FILES = [path for path in sorted(MIGRATIONS.glob("*.sql")) if "_check" not in path.name]


def statements(path: Path) -> list[str]:
    """Return the statements of a file, without comments and without the bodies of functions."""
    text = re.sub(r"--[^\n]*", "", path.read_text())
    text = re.sub(r"as \$\$.*?\$\$", "as ''", text, flags=re.DOTALL)
    return [" ".join(statement.split()) for statement in text.split(";")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.split("_", 1)[1])
def test_an_alter_table_changes_one_constraint(path: Path) -> None:
    for statement in statements(path):
        if statement.startswith("alter table"):
            assert len(re.findall(r"\b(?:add|drop) constraint\b", statement)) <= 1, statement


def test_rows_of_users_are_locked_one_by_one() -> None:
    (path,) = MIGRATIONS.glob("*_debit.sql")
    locks = re.findall(
        r'from public\."Users"\s+where ([^;]*?)\s+for no key update', path.read_text()
    )

    assert locks == ["card_id = user_id_input", "card_id = locked_user"]


def test_no_trigger_fires_for_truncate_and_for_rows() -> None:
    triggers = [
        statement
        for path in FILES
        for statement in statements(path)
        if statement.startswith(("create trigger", "create or replace trigger"))
    ]

    assert triggers
    assert not [trigger for trigger in triggers if re.search(r"truncate or|or truncate", trigger)]
