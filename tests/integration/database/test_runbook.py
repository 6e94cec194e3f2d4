"""The SQL statements of docs/operations.md work as described there."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from database import Database
from documents import code_in

RUNBOOK = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
USER = 710_001
NEW_CARD = 710_002
KEY = "the-key"
STATEMENTS = [
    # The runbook's user may already exist with entries.
    statement.replace("1001", str(USER)).replace("2002", str(NEW_CARD))
    for statement in code_in(RUNBOOK, "sql")
]
LAST_ENTRIES = "kind, amount_delta, balance_after, item"


@pytest.fixture
def ledger(database: Database) -> Iterator[Database]:
    """Provide a user with two debits, in a transaction that is rolled back."""
    with database.connection.transaction(force_rollback=True):
        database.add_user(1000, user_id=USER)
        for key in ("earlier", KEY):
            database.connection.execute(
                "select public.debit_use(%s, %s, %s)", (USER, database.add_item(350), key)
            )
        yield database


def run(ledger: Database, part: str) -> list[dict[str, object]]:
    """Run the statement of the runbook that contains this part; return its rows."""
    (statement,) = [candidate for candidate in STATEMENTS if part in candidate]
    cursor = ledger.connection.execute(statement)
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor] if names else []


def tamper(ledger: Database, table: str, statement: str) -> None:
    """Execute a statement with the triggers disabled, as the owner of the tables can."""
    ledger.connection.execute(f'alter table public."{table}" disable trigger user')
    ledger.connection.execute(statement)
    ledger.connection.execute(f'alter table public."{table}" enable trigger user')


def debit(ledger: Database, user_id: int, item_id: UUID, key: str) -> str:
    arguments = (user_id, item_id, key)
    statement = "select public.debit_use(%s, %s, %s) ->> 'outcome'"
    row = ledger.connection.execute(statement, arguments).fetchone()
    assert row is not None
    outcome: str = row[0]
    return outcome


def faults(ledger: Database) -> list[str]:
    return [fault for user_id, fault in ledger.audit() if user_id == USER]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_of_the_runbook_runs_unchanged(ledger: Database, statement: str) -> None:
    ledger.connection.execute(statement)


def test_the_runbook_shows_whether_a_user_was_charged(ledger: Database) -> None:
    (found,) = run(ledger, "find_payment")
    assert isinstance(found["find_payment"], dict)
    assert found["find_payment"]["outcome"] == "debited"
    entries = run(ledger, LAST_ENTRIES)
    assert [entry["kind"] for entry in entries] == ["debit", "debit", "opening"]
    assert [entry["idempotency_key"] for entry in entries] == [KEY, "earlier", None]


def test_a_cancelled_debit_does_not_charge_when_it_arrives_later(ledger: Database) -> None:
    item_id = ledger.add_item(350)
    (statement,) = [candidate for candidate in STATEMENTS if "9007199254740991" in candidate]
    statement = re.sub(r"'[0-9a-f-]{36}'", f"'{item_id}'", statement).replace(KEY, "late-key")

    row = ledger.connection.execute(statement).fetchone()

    assert row is not None
    assert row[0]["outcome"] == "price_changed"
    assert debit(ledger, USER, item_id, "late-key") == "idempotency_key_reused"
    assert ledger.balance(USER) == 300


def test_a_debit_that_arrived_before_it_was_cancelled_stays_charged(ledger: Database) -> None:
    assert run(ledger, "9007199254740991")[0]["debit_use"] == {
        "outcome": "idempotency_key_reused",
        "item_id": "550e8400-e29b-41d4-a716-446655440000",
        "expected_price": 9007199254740991,
        "replayed": False,
    }
    assert ledger.balance(USER) == 300


def test_a_refund_is_written_once_although_it_is_run_twice(ledger: Database) -> None:
    run(ledger, "'refund'")
    with pytest.raises(psycopg.errors.UniqueViolation), ledger.connection.transaction():
        run(ledger, "'refund'")
    assert ledger.balance(USER) == 650
    entry = run(ledger, LAST_ENTRIES)[0]
    assert (entry["kind"], entry["amount_delta"], entry["actor"]) == ("refund", 350, None)
    assert faults(ledger) == []


def test_a_refund_to_a_card_that_does_not_exist_fails(ledger: Database) -> None:
    (statement,) = [candidate for candidate in STATEMENTS if "'refund'" in candidate]
    with pytest.raises(psycopg.errors.CheckViolation), ledger.connection.transaction():
        ledger.connection.execute(statement.replace(str(USER), str(NEW_CARD)))


def test_a_missing_entry_is_found(ledger: Database) -> None:
    condition = f"user_id = {USER} and idempotency_key = 'earlier'"
    delete = f'delete from public."Transaction_History" where {condition}'
    tamper(ledger, "Transaction_History", delete)
    assert faults(ledger) == ["an entry does not follow from the one before it"]
    (entry,) = run(ledger, "off_by <> 0")
    assert (entry["kind"], entry["off_by"]) == ("debit", -350)


def test_a_correct_balance_gets_an_explaining_entry(ledger: Database) -> None:
    tamper(ledger, "Users", f'update public."Users" set balance = 790 where card_id = {USER}')
    assert faults(ledger) == ["the balance is not that of the last entry"]
    run(ledger, "right_balance")
    assert ledger.balance(USER) == 790
    assert faults(ledger) == []


def test_a_balance_without_entries_gets_an_explaining_entry(ledger: Database) -> None:
    delete = f'delete from public."Transaction_History" where user_id = {USER}'
    tamper(ledger, "Transaction_History", delete)
    assert faults(ledger) == ["the balance is not that of the last entry"]
    run(ledger, "right_balance")
    assert ledger.balance(USER) == 300
    assert faults(ledger) == []


def test_a_wrong_balance_is_not_overwritten_and_is_reset_from_the_entries(
    ledger: Database,
) -> None:
    tamper(ledger, "Users", f'update public."Users" set balance = 790 where card_id = {USER}')
    with (
        pytest.raises(psycopg.errors.CheckViolation, match="not that of the last entry"),
        ledger.connection.transaction(),
    ):
        debit(ledger, USER, ledger.add_item(50), "next")
    assert run(ledger, "balance_of_entries") == [{"balance": 790, "balance_of_entries": 300}]
    assert faults(ledger) == ["the balance is not that of the last entry"]

    run(ledger, 'update public."Users"\nset balance = coalesce(\n  (')
    assert ledger.balance(USER) == 300
    assert [entry["kind"] for entry in run(ledger, LAST_ENTRIES)] == ["debit", "debit", "opening"]
    assert debit(ledger, USER, ledger.add_item(50), "next") == "debited"
    assert faults(ledger) == []


def test_erasing_a_user_removes_the_name_pays_out_and_keeps_the_entries(
    ledger: Database,
) -> None:
    run(ledger, "set name = ''")
    assert debit(ledger, USER, ledger.add_item(50), "next") == "user_inactive"
    assert run(ledger, "select balance from") == [{"balance": 300}]
    run(ledger, "payout erasure")
    with pytest.raises(psycopg.errors.UniqueViolation), ledger.connection.transaction():
        run(ledger, "payout erasure")
    assert ledger.balance(USER) == 0
    row = ledger.connection.execute(
        'select name, active from public."Users" where card_id = %s', (USER,)
    ).fetchone()
    assert row == ("", False)
    kinds = [entry["kind"] for entry in run(ledger, LAST_ENTRIES)]
    assert kinds == ["payout", "debit", "debit", "opening"]
    assert faults(ledger) == []


def test_replacing_a_lost_card_writes_one_payout_and_one_credit(ledger: Database) -> None:
    for _ in range(2):
        run(ledger, "old_card constant")
        assert [(row["balance"], row["active"]) for row in both_cards(ledger)] == [
            (0, False),
            (300, True),
        ]
    assert run(ledger, LAST_ENTRIES)[0]["kind"] == "payout"
    kinds = ledger.connection.execute(
        'select kind, amount_delta from public."Transaction_History" where user_id = %s',
        (NEW_CARD,),
    ).fetchall()
    assert kinds == [("credit", 300)]
    assert debit(ledger, USER, ledger.add_item(0), "old") == "user_inactive"
    assert debit(ledger, NEW_CARD, ledger.add_item(50), "new") == "debited"
    assert faults(ledger) == []


def both_cards(ledger: Database) -> list[dict[str, object]]:
    rows = run(ledger, f'active from public."Users" where card_id in ({USER}, {NEW_CARD})')
    return sorted(rows, key=lambda row: str(row["card_id"]))


def test_money_does_not_leave_an_old_card_that_does_not_exist(ledger: Database) -> None:
    (statement,) = [candidate for candidate in STATEMENTS if "old_card constant" in candidate]
    with (
        pytest.raises(psycopg.errors.RaiseException, match="old card 710003 does not exist"),
        ledger.connection.transaction(),
    ):
        ledger.connection.execute(statement.replace(str(USER), "710003"))
    assert len(both_cards(ledger)) == 1


@pytest.mark.parametrize(("name", "is_active"), [("somebody else", True), ("test", False)])
def test_money_does_not_move_to_the_card_of_another_user_or_an_inactive_card(
    ledger: Database, name: str, is_active: bool
) -> None:
    ledger.connection.execute(
        'insert into public."Users" (card_id, name, active) values (%s, %s, %s)',
        (NEW_CARD, name, is_active),
    )
    ledger.connection.execute(
        """update public."Users" set name = 'test' where card_id = %s""", (USER,)
    )
    before = both_cards(ledger)
    with (
        pytest.raises(psycopg.errors.RaiseException, match="is inactive or has another name"),
        ledger.connection.transaction(),
    ):
        run(ledger, "old_card constant")
    assert both_cards(ledger) == before


@dataclass(frozen=True)
class LostData:
    """A user with 300, and operations that a restore lost: item, decline, top-up, debit."""

    database: Database
    user_id: int

    def add_item(self) -> UUID:
        return self.database.add_item(350)

    def top_up(self) -> None:
        self.database.connection.execute(
            'update public."Users" set balance = balance + 500 where card_id = %s', (self.user_id,)
        )

    def debit(self, item_id: UUID, key: str) -> str:
        return debit(self.database, self.user_id, item_id, key)

    def balance(self) -> int:
        return self.database.balance(self.user_id)


@pytest.fixture
def lost(ledger: Database) -> LostData:
    """Return the state of the backup, before the lost operations."""
    lost = LostData(ledger, ledger.add_user(300))
    with ledger.connection.transaction(force_rollback=True):
        item_id = lost.add_item()
        assert lost.debit(item_id, "declined") == "insufficient_funds"
        lost.top_up()
        assert lost.debit(item_id, "charged") == "debited"
        assert lost.balance() == 450
    assert lost.balance() == 300
    return lost


def test_lost_data_is_entered_again_in_the_order_of_the_runbook(lost: LostData) -> None:
    item_id = lost.add_item()
    lost.top_up()
    assert lost.debit(item_id, "charged") == "debited"
    assert lost.balance() == 450
    assert lost.debit(item_id, "charged") == "debited"  # a retry
    assert lost.balance() == 450
    assert lost.database.audit() == []


def test_a_lost_declined_debit_is_charged_after_a_restore(lost: LostData) -> None:
    item_id = lost.add_item()
    lost.top_up()
    assert lost.debit(item_id, "declined") == "debited"


@pytest.mark.parametrize("outcome", ["item_not_found", "insufficient_funds"])
def test_a_debit_repeated_too_early_after_a_restore_stays_declined(
    lost: LostData, outcome: str
) -> None:
    item_id = uuid4() if outcome == "item_not_found" else lost.add_item()
    assert lost.debit(item_id, "charged") == outcome
    lost.top_up()
    lost.database.connection.execute(
        'insert into public."Items" (id, name, price) values (%s, %s, 350) on conflict do nothing',
        (item_id, "test"),
    )
    assert lost.debit(item_id, "charged") == outcome
