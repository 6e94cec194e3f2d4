"""Whether the answers of a run are true."""

from collections import defaultdict
from collections.abc import Iterator

from app.api.schemas import Payment
from app.errors import LedgerRejected, LedgerUnavailable, PaymentError
from app.ledger.outcomes import Debited, Declined
from simulation.database import Entry
from simulation.run import Answer, Run, describe
from simulation.schedule import Fault, Purchase


def check_charges(run: Run) -> Iterator[str]:
    """Nobody is charged twice, or by a call that was sent after the answer."""
    yield from run.database.violations
    for purchase, entries in _entries(run).items():
        if len(entries) > 1:
            yield f"purchase {purchase} is charged {len(entries)} times"
    for user_id, user in run.database.users.items():
        if user.balance < 0:
            yield f"the balance of user {user_id} is {user.balance}"


def check_answers(run: Run) -> Iterator[str]:
    """Every answer is what the ledger says."""
    entries = _entries(run)
    for purchase, answers in _answers(run).items():
        number = purchase.number
        for answer in answers:
            result = answer.result
            if isinstance(result, Debited):
                if not any(_equals(result, entry) for entry in entries[number]):
                    yield f"purchase {number} was told {result!r}; that is not in the ledger"
            elif not isinstance(result, PaymentError) or result.code == "internal_error":
                yield f"purchase {number}: a bug: {result!r}"
            elif result.money_moved == "no":
                if result.code != "ledger_rejected":
                    yield from _check_not_charged(answer, answers, entries[number])
                yield from _check_decline(answer.purchase, result, run)
            elif purchase.key and result.members.get("idempotency_key") != purchase.key:
                yield f"purchase {number} is unknown without its key"
    missing = sum(len(purchase.arrivals) for purchase in run.schedule.purchases) - len(run.answers)
    if missing:
        yield f"{missing} requests got no answer"


def check_rejections(run: Run) -> Iterator[str]:
    """Only what the database rejects is told as rejected (rows 9 and 16)."""
    entries = _entries(run)
    for purchase, answers in _answers(run).items():
        for answer in answers:
            if not isinstance(answer.result, LedgerRejected):
                continue
            if not run.gateway.fault_counts[Fault.REJECTED]:
                yield f"purchase {purchase.number} was told ledger_rejected without a reason"
            yield from _check_not_charged(answer, answers, entries[purchase.number])


def _check_not_charged(
    answer: Answer, answers: list[Answer], entries: list[Entry]
) -> Iterator[str]:
    """Who is told "not charged" was not charged by that request, now or later."""
    number = answer.purchase.number
    for entry in entries:
        # All that were under way when the call was sent may have caused it.
        causes = [one for one in answers if one.started_at <= entry.sent_at <= one.ended_at]
        if not causes:
            yield f"purchase {number} was charged by a call that was sent after its answers"
        elif answer in causes and all(_is_told_not_charged(one) for one in causes):
            told = describe(answer.result)
            yield f"purchase {number} was told {told}; a call of {entry.sent_at:.4f} charged it"


def _check_decline(purchase: Purchase, problem: PaymentError, run: Run) -> Iterator[str]:
    """A decline has the reason that it names."""
    database, code = run.database, problem.code
    stored = [one for one in database.outcomes.values() if one["item_id"] == str(purchase.item_id)]
    reasons = {
        "user_not_found": purchase.user_id not in database.users,
        "item_not_found": purchase.product not in database.products,
        "item_inactive": bool(run.schedule.changes),
        "products_unavailable": bool(run.schedule.products_outages),
        "overloaded": run.schedule.waiting_max < len(run.answers),
        # A key is reused if another purchase is stored under it.
        "idempotency_key_reused": not stored and bool(purchase.key),
    }
    told = (code, problem.members.get("price"))
    is_stored = any((one["outcome"], one.get("price")) == told for one in stored)
    if not reasons.get(code, is_stored or code in ("ledger_unavailable", "ledger_rejected")):
        yield f"purchase {purchase.number} was told {told}, without a reason"


def check_lookups(run: Run) -> Iterator[str]:
    """A lookup finds what was answered before it, and at the end what the ledger has."""
    for lookup in [*run.lookups, *run.late_lookups]:
        purchase, result = lookup.purchase, lookup.result
        if isinstance(result, Exception) and not isinstance(result, LedgerUnavailable):
            yield f"lookup of purchase {purchase.number}: {result!r}"
        if isinstance(result, Exception) or result is not None:
            continue
        for answer in run.answers:
            if (
                answer.purchase is purchase
                and answer.ended_at < lookup.started_at
                and isinstance(answer.result, Debited)
            ):
                yield f"lookup of purchase {purchase.number} found nothing after a debit"
    for lookup in run.late_lookups:
        purchase, result = lookup.purchase, lookup.result
        stored = run.database.find(purchase.user_id, purchase.key or "")
        found = result.outcome if isinstance(result, Debited | Declined) else None
        if isinstance(result, Exception) or found != (stored["outcome"] if stored else None):
            yield f"lookup of purchase {purchase.number} at the end: {result!r}, not {stored}"


def check_replays(run: Run) -> Iterator[str]:
    """An outcome is answered as new once, and as a replay afterwards (row 10)."""
    for purchase, answers in _answers(run).items():
        settled = [one for one in answers if _is_stored(one)]
        as_new = [one for one in settled if not getattr(one.result, "replayed", False)]
        if len(as_new) > 1:
            yield f"purchase {purchase.number} was answered {len(as_new)} times as a new one"
        if len(answers) == 1 and len(as_new) < len(settled):
            yield f"purchase {purchase.number} was sent once and answered as a replay"


def _is_stored(answer: Answer) -> bool:
    """Tell whether the answer is the outcome that the ledger stores under the key."""
    code = getattr(answer.result, "code", "debited")
    return code in ("debited", "insufficient_funds", "price_changed", "user_inactive")


def _is_told_not_charged(answer: Answer) -> bool:
    return isinstance(answer.result, PaymentError) and answer.result.money_moved == "no"


def _equals(payment: Debited, entry: Entry) -> bool:
    body = Payment.model_validate(payment).model_dump(mode="json")
    return body | {"created_at": entry.outcome["created_at"]} == {
        name: entry.outcome[name] for name in body
    }


def _entries(run: Run) -> defaultdict[int, list[Entry]]:
    entries: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in run.database.entries:
        entries[entry.purchase].append(entry)
    return entries


def _answers(run: Run) -> dict[Purchase, list[Answer]]:
    answers: dict[Purchase, list[Answer]] = {}
    for answer in run.answers:
        answers.setdefault(answer.purchase, []).append(answer)
    return answers
