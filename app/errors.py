"""Every way in which a request can be refused or fail; the HTTP answer stands on the class."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

PROBLEMS: dict[str, type["PaymentError"]] = {}

RETRY_AFTER = {"Retry-After": "1"}
BEARER = {"WWW-Authenticate": "Bearer"}
IDENTITY = {"Accept-Encoding": "identity"}
CLOSE = {"Connection": "close"}


class PaymentError(Exception):
    """A refusal or failure as the caller sees it (RFC 9457); subclasses with a code are listed.

    `detail` overrides the title as the sentence for this occurrence; `members` are what the code
    adds to the problem's body.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    advice: ClassVar[str]
    money_moved: ClassVar[Literal["no", "unknown"]] = "no"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        PROBLEMS[cls.code] = cls

    def __init__(self, detail: str | None = None, **members: object) -> None:
        super().__init__(detail or self.title)
        self.members = members
        self.replayed = False


class InvalidRequest(PaymentError):
    status, code = 422, "invalid_request"
    title = "Invalid request"
    meaning = "The body, path, query or a header is not as documented; errors names each fault."
    advice = "Correct the request; sending it again unchanged gives the same answer."


class RequestTooLarge(PaymentError):
    status, code = 413, "request_too_large"
    title = "Request too large"
    meaning = "The body is over 16 KiB."
    advice = "Send only the documented fields."


class RequestTimeout(PaymentError):
    status, code, headers = 408, "request_timeout", CLOSE
    title = "The request did not arrive in time"
    meaning = "The headers or the body were not complete within 10 seconds."
    advice = "Send the request again, in one go."


class UnsupportedEncoding(PaymentError):
    status, code, headers = 415, "unsupported_encoding", IDENTITY
    title = "The encoding of the body is not supported"
    meaning = (
        "The body is compressed, or its characters are not in UTF-8; detail names the encoding."
    )
    advice = "Send JSON in UTF-8, without Content-Encoding."


class HeadersTooLarge(PaymentError):
    status, code = 431, "headers_too_large"
    title = "Headers too large"
    meaning = (
        "The request line and the headers are over 64 KiB, or there are more than 100 headers or "
        "more than 1,000 percent-encoded characters in the address."
    )
    advice = "Send fewer and shorter headers."


class MalformedRequest(PaymentError):
    status, code = 400, "malformed_request"
    title = "This is not a valid HTTP/1.1 request"
    meaning = "The request line, a header or the framing of the body breaks the rules of HTTP/1.1."
    advice = "Use an HTTP client library, with http:// and not https:// if no proxy is in between."


class Unauthenticated(PaymentError):
    status, code, headers = 401, "unauthenticated", BEARER
    title = "A valid token is needed"
    meaning = "There is no bearer token, or it is not valid: detail says why."
    advice = "Get a token from the issuer and send it as Authorization: Bearer."


class Forbidden(PaymentError):
    status, code = 403, "forbidden"
    title = "The token does not allow this"
    meaning = "The token is valid, but lacks the role, or the products service refuses it."
    advice = "Ask whoever administers the issuer for the role that payments need."


class AuthenticationUnavailable(PaymentError):
    status, code, headers = 503, "authentication_unavailable", RETRY_AFTER
    title = "The token cannot be checked now"
    meaning = "The token names a key not seen before, and the issuer's keys cannot be fetched."
    advice = "Try again after the time in Retry-After."


class UserNotFound(PaymentError):
    status, code = 404, "user_not_found"
    title = "User not found"
    meaning = "No user has this id."
    advice = "Check the card's number."


class IdempotencyKeyReused(PaymentError):
    status, code = 422, "idempotency_key_reused"
    title = "The idempotency key was used for another debit"
    meaning = "The key was used for this user, with another item or price, or by another client."
    advice = "Make a new key for each new debit; keep it only to ask for the same one again."


class UserInactive(PaymentError):
    status, code = 403, "user_inactive"
    title = "User is not active"
    meaning = "The user is switched off and cannot pay."
    advice = "Send the user to whoever administers the cards."


class ItemNotFound(PaymentError):
    status, code = 404, "item_not_found"
    title = "Item not found"
    meaning = "The products service or the ledger does not know this item."
    advice = "Check the item's id; a new item may not have reached the ledger yet."


class ItemInactive(PaymentError):
    status, code = 409, "item_inactive"
    title = "Item is not for sale"
    meaning = "The products service or the ledger says that the item is not for sale."
    advice = "Take the item out of the selection."


class PriceChanged(PaymentError):
    status, code = 409, "price_changed"
    title = "The price has changed"
    meaning = "expected_price is not the price now; price is."
    advice = "Show the customer the new price and ask again."


class InsufficientFunds(PaymentError):
    status, code = 402, "insufficient_funds"
    title = "Insufficient funds"
    meaning = "The balance is below the price."
    advice = "Ask the customer to top up or to choose something cheaper."


class ProductsUnavailable(PaymentError):
    status, code, headers = 503, "products_unavailable", RETRY_AFTER
    title = "The products service is not available"
    meaning = "The products service is down, slow, or gave an answer that makes no sense."
    advice = "Try again after the time in Retry-After."


class LedgerUnavailable(PaymentError):
    status, code, headers = 503, "ledger_unavailable", RETRY_AFTER
    title = "The ledger is not available"
    meaning = "The database did not take the debit, or rolled it back, and may take it later."
    advice = "Try again after the time in Retry-After."


class Overloaded(PaymentError):
    status, code, headers = 503, "overloaded", RETRY_AFTER
    title = "Too many debits are waiting"
    meaning = (
        "More debits, or more of this user, are waiting or more connections are open than the "
        "service allows."
    )
    advice = "Try again after the time in Retry-After."


class OutcomeUnknown(PaymentError):
    status, code, money_moved = 504, "outcome_unknown", "unknown"
    title = "Whether the user was charged is not known"
    meaning = "The debit was sent to the database, no answer came, and asking again did not help."
    advice = (
        "Ask GET /payments/outcome, or send the same debit again, with the idempotency_key of this "
        "problem; a debit under another key could charge a second time."
    )


class LedgerRejected(PaymentError):
    status, code = 500, "ledger_rejected"
    title = "The ledger refused the call"
    meaning = "The database refuses the call for a reason that trying again cannot mend."
    advice = "Tell the operator: a migration is missing or the key is wrong."


class InternalError(PaymentError):
    status, code, money_moved = 500, "internal_error", "unknown"
    title = "Internal error"
    meaning = "A fault in this service."
    advice = "Tell the operator, with the request_id."


class PaymentNotFound(PaymentError):
    status, code = 404, "payment_not_found"
    title = "No outcome is recorded under this key"
    meaning = "The user has neither been charged nor declined under this key."
    advice = "If a debit under this key may still be on its way, send it again with the same key."


class NotFound(PaymentError):
    status, code = 404, "not_found"
    title = "Not found"
    meaning = "Nothing is served at this path."
    advice = "See /docs for what there is."


class MethodNotAllowed(PaymentError):
    status, code = 405, "method_not_allowed"
    title = "Method not allowed"
    meaning = "This path is served for other methods; Allow names them."
    advice = "See /docs for what there is."
