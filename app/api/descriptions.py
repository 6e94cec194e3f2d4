"""Descriptions of the operations in Markdown, as Swagger UI and ReDoc show them."""

# ruff: noqa: E501 - Swagger UI shows the line breaks of a paragraph, so each paragraph is one line

SERVICE = """
Charges a student's prepaid balance for an item. All money is integers in minor units: öre, 1/100 krona.

**Try it.** The examples work on the seeded data of `make run`:

1. Open `POST /payments/debit` and press *Try it out*.
2. Choose one of the *Examples* and press *Execute*. Leave `Idempotency-Key` empty, or change it for each example.
3. The response shows the new balance, or the problem and its code.

| user_id | user | balance |
| --- | --- | --- |
| 1001 | Alice | 5000 |
| 1002 | Bob | 3500 |
| 1003 | Carol, deactivated | 2000 |
| 1004 | Dan, without money | 0 |
| 9007199254740993 | Eve, with a long card number | 120000 |

| item_id | item | price |
| --- | --- | --- |
| 550e8400-e29b-41d4-a716-446655440000 | Coffee | 350 |
| 550e8400-e29b-41d4-a716-446655440001 | Sandwich | 650 |
| 550e8400-e29b-41d4-a716-446655440002 | Tap water | 0 |
| 550e8400-e29b-41d4-a716-446655440003 | Last year's calendar, not for sale | 100 |

**Problems.** An error is a problem (RFC 9457) with the media type `application/problem+json`. In your program, compare `code`: the sentences may change. `GET /problems` explains each code: what it means, what to do, and whether the request charged the user.
"""

DEBIT = """
Charges the user the current price of the item, and returns the new balance.

**When to use it:** for each purchase of one item, at the moment of the sale.

**Retries.** Send a new random UUID in `Idempotency-Key` for each purchase, and the same key when you retry. The user is charged at most once for a key. A retry gets the first response again, with the header `Idempotent-Replayed: true`. A refusal by the database (a decline) is stored too: after the customer has topped up, send a new key.

**Price.** The database decides the price at the moment of the debit. If you send `expected_price` and the price has changed, the user is not charged.

**Was the user charged?**

| response | charged | what to do |
| --- | --- | --- |
| 200 | yes, exactly once | Hand out the item. |
| no response | unknown | Retry with the same key, or look up the outcome. |
| 504 `outcome_unknown` | unknown | Retry with the key in `idempotency_key`, or look up the outcome. |
| 500 `internal_error` | unknown | Look up the outcome, and report the `request_id`. |
| 503 | not by this request | Retry with the same key, after the time in `Retry-After`. |
| every other problem | not by this request | See the code below. |

The column *charged* tells only what this request did. An earlier request with the same key may have charged the user, if it got no response, 500 or 504. To be sure, look up the outcome.

**Order of checks:** request, token, item at the products service; then in the database: user, idempotency key, user active, item, price, balance.

**Try it:** choose one of the *Examples*. Leave `Idempotency-Key` empty, or change it for each example.
"""

OUTCOME = """
Returns the outcome of a debit, found by its idempotency key. The operation only reads: it charges nobody.

**When to use it:** a debit got no response, 500 or 504, and you want to know whether the user was charged. If you want the purchase to happen, retry the debit with the same key instead: the user is charged once.

| response | charged by the debit |
| --- | --- |
| 200 with a payment | yes, exactly once |
| 200 with `outcome` | no: the database declined the debit; `outcome` is the code of the decline |
| 404 `payment_not_found` | no; an earlier debit with this key may still be on its way |
| every other problem | unknown: correct the request, or look it up again |

**After `payment_not_found`:** if the customer still wants the item, repeat the debit with the same key. If not, ask again. If nothing is stored a minute after the last debit request has ended, nobody was charged.

Send the key in the header `Idempotency-Key` or in the query. Proxies often log the query, but rarely this header.

**Try it:** copy the key of this example into `Idempotency-Key` of `POST /payments/debit`, execute that, then come back. Without such a debit, the response is `payment_not_found`.
"""

HEALTH = """
Returns 200 while the process responds. It checks no dependency.

**When to use it:** as the liveness probe of Kubernetes or a load balancer.
"""

READY = """
Returns 200 once the database and, if tokens are required, the issuer have responded. Returns 503 before that, and after SIGTERM.

**When to use it:** as the readiness probe, and to see why a new installation does not work: `dependencies` shows the last known state of each dependency.

A later outage of a dependency does not change the status. Callers then get problems such as `ledger_unavailable`.
"""

METRICS = """
Returns the metrics of this process in the text format of Prometheus.

**When to use it:** as the target of a Prometheus scrape job.
"""

PROBLEMS = """
Returns all problems: code, status, meaning, what the caller should do, and whether the request charged the user.

**When to use it:** when you write the error handling of a client. `money_moved` says whether the request charged the user: `no` or `unknown`, never "yes".
"""

PROBLEM = """
Returns the explanation of one code.

**When to use it:** when you got a problem and want to know what it means. Its member `type` is the path of this operation.
"""
