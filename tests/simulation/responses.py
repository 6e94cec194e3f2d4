"""Checks of whether the responses of a run are true."""

from collections import defaultdict
from collections.abc import Iterator

from app.api.schemas import Payment
from app.errors import LedgerRejected, LedgerUnavailable, PaymentError
from app.ledger.outcomes import Debited, Declined
from simulation.database import Entry
from simulation.run import CompletedRequest, Run, describe
from simulation.schedule import Fault, Purchase


def check_charges(run: Run) -> Iterator[str]:
    """Yield purchases that are charged twice, and negative balances."""
    yield from run.database.violations
    for purchase, entries in _entries(run).items():
        if len(entries) > 1:
            yield f"purchase {purchase} is charged {len(entries)} times"
    for user_id, user in run.database.users.items():
        if user.balance < 0:
            yield f"the balance of user {user_id} is {user.balance}"


def check_responses(run: Run) -> Iterator[str]:
    """Yield responses that do not match the ledger."""
    entries = _entries(run)
    for purchase, requests in _requests_by_purchase(run).items():
        number = purchase.number
        for request in requests:
            result = request.result
            if isinstance(result, Debited):
                if not any(_equals(result, entry) for entry in entries[number]):
                    yield f"purchase {number} got {result!r}, which is not in the ledger"
            elif not isinstance(result, PaymentError) or result.code == "internal_error":
                yield f"purchase {number}: a bug: {result!r}"
            elif result.money_moved == "no":
                if result.code != "ledger_rejected":
                    yield from _check_not_charged(request, requests, entries[number])
                yield from _check_decline(request.purchase, result, run)
            elif purchase.key and result.members.get("idempotency_key") != purchase.key:
                yield f"purchase {number} is unknown without its key"
    missing = sum(len(purchase.arrivals) for purchase in run.schedule.purchases) - len(run.requests)
    if missing:
        yield f"{missing} requests got no response"


def check_rejections(run: Run) -> Iterator[str]:
    """Yield ledger_rejected responses without a rejection by the database (rows 9 and 16)."""
    entries = _entries(run)
    for purchase, requests in _requests_by_purchase(run).items():
        for request in requests:
            if not isinstance(request.result, LedgerRejected):
                continue
            if not run.gateway.fault_counts[Fault.REJECTED]:
                yield f"purchase {purchase.number} got ledger_rejected without a reason"
            yield from _check_not_charged(request, requests, entries[purchase.number])


def _check_not_charged(
    request: CompletedRequest, requests: list[CompletedRequest], entries: list[Entry]
) -> Iterator[str]:
    """Yield entries of requests whose response says that they were not charged."""
    number = request.purchase.number
    for entry in entries:
        # Every request that was in flight when the call was sent may have caused the entry.
        causes = [
            other for other in requests if other.started_at <= entry.sent_at <= other.ended_at
        ]
        if not causes:
            yield f"purchase {number} was charged by a call that was sent after its responses"
        elif request in causes and all(_says_not_charged(cause) for cause in causes):
            code = describe(request.result)
            yield f"purchase {number} got {code}; a call at {entry.sent_at:.4f} charged it"


def _check_decline(purchase: Purchase, problem: PaymentError, run: Run) -> Iterator[str]:
    """Yield declines whose reason is not true."""
    database = run.database
    code = problem.code
    stored = [
        outcome
        for outcome in database.outcomes.values()
        if outcome["item_id"] == str(purchase.item_id)
    ]
    reasons = {
        "user_not_found": purchase.user_id not in database.users,
        "item_not_found": purchase.product not in database.products,
        "item_inactive": bool(run.schedule.changes),
        "products_unavailable": bool(run.schedule.products_outages),
        "overloaded": run.schedule.waiting_max < len(run.requests),
        # A key is reused if another purchase is stored under it.
        "idempotency_key_reused": not stored and bool(purchase.key),
    }
    returned = (code, problem.members.get("price"))
    is_stored = any((outcome["outcome"], outcome.get("price")) == returned for outcome in stored)
    if not reasons.get(code, is_stored or code in ("ledger_unavailable", "ledger_rejected")):
        yield f"purchase {purchase.number} got {returned} without a reason"


def check_lookups(run: Run) -> Iterator[str]:
    """Yield lookups that miss an earlier payment, or at the end differ from the ledger."""
    for lookup in [*run.lookups, *run.late_lookups]:
        purchase = lookup.purchase
        result = lookup.result
        if isinstance(result, Exception) and not isinstance(result, LedgerUnavailable):
            yield f"lookup of purchase {purchase.number}: {result!r}"
        if isinstance(result, Exception) or result is not None:
            continue
        for request in run.requests:
            if (
                request.purchase is purchase
                and request.ended_at < lookup.started_at
                and isinstance(request.result, Debited)
            ):
                yield f"lookup of purchase {purchase.number} found nothing after a debit"
    for lookup in run.late_lookups:
        purchase = lookup.purchase
        result = lookup.result
        stored = run.database.find(purchase.user_id, purchase.key or "")
        found = result.outcome if isinstance(result, Debited | Declined) else None
        if isinstance(result, Exception) or found != (stored["outcome"] if stored else None):
            yield f"lookup of purchase {purchase.number} at the end: {result!r}, not {stored}"


def check_replays(run: Run) -> Iterator[str]:
    """Yield outcomes that are returned as new more than once, or wrongly as a replay (row 10)."""
    for purchase, requests in _requests_by_purchase(run).items():
        stored = [request for request in requests if _is_stored(request)]
        as_new = [request for request in stored if not getattr(request.result, "replayed", False)]
        if len(as_new) > 1:
            yield f"purchase {purchase.number} got {len(as_new)} responses that are not replays"
        if len(requests) == 1 and len(as_new) < len(stored):
            yield f"purchase {purchase.number} was sent once and got a replay"


def _is_stored(request: CompletedRequest) -> bool:
    """Return whether the ledger stores the outcome of the request with its key."""
    code = getattr(request.result, "code", "debited")
    return code in ("debited", "insufficient_funds", "price_changed", "user_inactive")


def _says_not_charged(request: CompletedRequest) -> bool:
    return isinstance(request.result, PaymentError) and request.result.money_moved == "no"


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


def _requests_by_purchase(run: Run) -> dict[Purchase, list[CompletedRequest]]:
    requests: dict[Purchase, list[CompletedRequest]] = {}
    for request in run.requests:
        requests.setdefault(request.purchase, []).append(request)
    return requests
