"""Mutants of the service: its calls to the database and its responses."""

from mutants.mutant import Mutant

OF_RESPONSES = (
    (
        "a repeated payment has no header",
        "api/payments.py",
        "    headers = REPLAYED if debited.replayed else None\n",
        "    headers = None\n",
    ),
    (
        "a repeated decline has no header",
        "ledger/outcomes.py",
        "        problem.replayed = self.replayed\n",
        "",
    ),
    (
        "the changed price is not returned",
        "ledger/outcomes.py",
        "(None, **self.members)\n",
        "()\n",
    ),
    (
        "every decline is insufficient funds",
        "ledger/outcomes.py",
        "        problem = DECLINES[self.outcome](",
        "        problem = InsufficientFunds(",
    ),
    (
        "an inactive user has the status of an unknown user",
        "errors.py",
        '    status = 403\n    code = "user_inactive"\n',
        '    status = 404\n    code = "user_inactive"\n',
    ),
    (
        "a lookup returns a decline as not found",
        "api/payments.py",
        "    if outcome is None:\n",
        "    if not isinstance(outcome, Debited):\n",
    ),
    (
        "a retry for a removed item is refused",
        "payments/debits.py",
        "            if callers_key is None:\n",
        "            if callers_key:\n",
    ),
    (
        "another debit with the key is replayed for a removed item",
        "payments/debits.py",
        " or not outcome.matches(debit)",
        "",
    ),
    (
        "an item that is not for sale goes to the database",
        "payments/debits.py",
        "            if not item.active:\n",
        "            if False:\n",
    ),
    (
        "the caller's key is not used",
        "payments/debits.py",
        "callers_key or attempt, attempt",
        "attempt, attempt",
    ),
    (
        "the expected price is not passed on",
        "ledger/outcomes.py",
        '        "expected_price_input": keyed.debit.expected_price,\n',
        '        "expected_price_input": None,\n',
    ),
)

OF_BATCHES = (
    (
        "callers of a batch get each other's outcomes",
        "ledger/lane.py",
        "zip(batch, outcomes, strict=True)",
        "zip(batch, outcomes[::-1], strict=True)",
    ),
)

OF_FAULTS = (
    (
        "a debit whose first response was lost is a replay",
        "ledger/outcomes.py",
        "    if outcome.replayed and str(outcome.attempt) == keyed.attempt:\n",
        "    if False:\n",
    ),
    (
        "an unknown outcome is returned as not charged",
        "ledger/client.py",
        "                if retries.may_have_committed:\n",
        "                if False:\n",
    ),
    (
        "an unknown outcome of a batch is returned as not charged",
        "ledger/lane.py",
        "            if waiting.may_have_committed:\n"
        "                waiting.settle(OutcomeUnknown(idempotency_key=waiting.keyed.key))\n",
        "            if False:\n"
        "                waiting.settle(OutcomeUnknown(idempotency_key=waiting.keyed.key))\n",
    ),
    (
        "a lost response means not charged",
        "ledger/failures.py",
        "        return OutcomeUnknown if was_sent(error) else LedgerUnavailable\n",
        "        return LedgerUnavailable\n",
    ),
)

MUTANTS = [
    Mutant(f"service: {name}", f"app/{file}", old, new, found_by)
    for found_by, mutants in (
        ("test_sequential.py", OF_RESPONSES),
        ("test_concurrent.py", OF_BATCHES),
        ("test_faulty_gateway.py", OF_FAULTS),
    )
    for name, file, old, new in mutants
]
