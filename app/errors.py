"""Every way in which a request can be refused or fail; each class holds its HTTP response."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

RETRY_AFTER = {"Retry-After": "1"}
BEARER = {"WWW-Authenticate": "Bearer"}
IDENTITY = {"Accept-Encoding": "identity"}
CLOSE = {"Connection": "close"}
EXAMPLE_KEY = "5a1bd1d2-6c53-4c0a-9c07-0c5d1c1a7f11"


class PaymentError(Exception):
    """A refusal or failure as the caller sees it (RFC 9457).

    `detail` replaces the title as the sentence for this occurrence. `members` are the values of
    the class's `extension`, which declares what the code adds to a problem's body.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    advice: ClassVar[str]
    money_moved: ClassVar[Literal["no", "unknown"]] = "no"
    extension: ClassVar[type[BaseModel] | None] = None
    example_detail: ClassVar[str | None] = None
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str | None = None, **members: object) -> None:
        super().__init__(detail or self.title)
        self.members = members
        self.replayed = False


class FieldFault(BaseModel):
    """One fault in a request: where it is, and what is wrong there."""

    detail: str
    pointer: str | None = Field(None, description="The body's field, as a JSON Pointer fragment.")
    parameter: str | None = Field(None, description="The path or query parameter.")
    header: str | None = Field(None, description="The header.")


class Faults(BaseModel):
    """What `invalid_request` adds to a problem."""

    errors: list[FieldFault] = Field(
        description="the faults.",
        examples=[[{"pointer": "#/user_id", "detail": "Field required"}]],
    )


class CurrentPrice(BaseModel):
    """What `price_changed` adds to a problem."""

    price: int = Field(description="the price now.", examples=[400])


class KeyToAskWith(BaseModel):
    """What `outcome_unknown` adds to a problem."""

    idempotency_key: str = Field(description="the key to ask again with.", examples=[EXAMPLE_KEY])


class InvalidRequest(PaymentError):
    status = 422
    code = "invalid_request"
    extension = Faults
    example_detail = "The body is not as documented"
    title = "Invalid request"
    meaning = "The body, path, query or a header is not as documented; errors names each fault."
    advice = "Correct the request; the same request gets the same response."


class RequestTooLarge(PaymentError):
    status = 413
    code = "request_too_large"
    title = "Request too large"
    meaning = "The body is over 16 KiB."
    advice = "Send only the documented fields."


class RequestTimeout(PaymentError):
    status = 408
    code = "request_timeout"
    headers = CLOSE
    title = "The request did not arrive in time"
    meaning = "The headers or the body were not complete within 10 seconds."
    advice = "Send the request again, in one go."


class UnsupportedEncoding(PaymentError):
    status = 415
    code = "unsupported_encoding"
    headers = IDENTITY
    title = "The encoding of the body is not supported"
    meaning = (
        "The body is compressed, or its characters are not in UTF-8; detail names the encoding."
    )
    advice = "Send JSON in UTF-8, without Content-Encoding."


class HeadersTooLarge(PaymentError):
    status = 431
    code = "headers_too_large"
    title = "Headers too large"
    meaning = (
        "The request line and the headers are over 64 KiB, or there are more than 100 headers or "
        "more than 1,000 percent-encoded characters in the address."
    )
    advice = "Send fewer and shorter headers."


class MalformedRequest(PaymentError):
    status = 400
    code = "malformed_request"
    title = "This is not a valid HTTP/1.1 request"
    meaning = "The request line, a header or the framing of the body breaks the rules of HTTP/1.1."
    advice = "Use an HTTP client library, with http:// and not https:// if no proxy is in between."


class Unauthenticated(PaymentError):
    status = 401
    code = "unauthenticated"
    headers = BEARER
    title = "A valid token is needed"
    meaning = "There is no bearer token, or it is not valid: detail says why."
    advice = "Get a token from the issuer and send it as Authorization: Bearer."


class Forbidden(PaymentError):
    status = 403
    code = "forbidden"
    title = "The token does not allow this"
    meaning = "The token is valid, but lacks the role, or the products service refuses it."
    advice = "Ask the administrator of the issuer for the role that payments need."


class AuthenticationUnavailable(PaymentError):
    status = 503
    code = "authentication_unavailable"
    headers = RETRY_AFTER
    title = "The token cannot be checked now"
    meaning = "The token names a key not seen before, and the issuer's keys cannot be fetched."
    advice = "Try again after the time in Retry-After."


class UserNotFound(PaymentError):
    status = 404
    code = "user_not_found"
    title = "User not found"
    meaning = "No user has this id."
    advice = "Check the card's number."


class IdempotencyKeyReused(PaymentError):
    status = 422
    code = "idempotency_key_reused"
    title = "The idempotency key was used for another debit"
    meaning = "The key was used for this user, with another item or price, or by another client."
    advice = "Make a new key for each new debit; keep it only to ask for the same one again."


class UserInactive(PaymentError):
    status = 403
    code = "user_inactive"
    title = "User is not active"
    meaning = "The user is deactivated and cannot pay."
    advice = "Send the user to the administrator of the cards."


class ItemNotFound(PaymentError):
    status = 404
    code = "item_not_found"
    title = "Item not found"
    meaning = "The products service or the ledger does not know this item."
    advice = "Check the item's id; a new item may not have reached the ledger yet."


class ItemInactive(PaymentError):
    status = 409
    code = "item_inactive"
    title = "Item is not for sale"
    meaning = "The products service or the ledger says that the item is not for sale."
    advice = "Take the item out of the selection."


class PriceChanged(PaymentError):
    status = 409
    code = "price_changed"
    extension = CurrentPrice
    title = "The price has changed"
    meaning = "expected_price differs from the current price, which is in price."
    advice = "Show the customer the new price and ask again."


class InsufficientFunds(PaymentError):
    status = 402
    code = "insufficient_funds"
    title = "Insufficient funds"
    meaning = "The balance is below the price."
    advice = "Ask the customer to top up or to choose something cheaper."


class ProductsUnavailable(PaymentError):
    status = 503
    code = "products_unavailable"
    headers = RETRY_AFTER
    title = "The products service is not available"
    meaning = "The products service is down, too slow or returned an invalid response."
    advice = "Try again after the time in Retry-After."


class LedgerUnavailable(PaymentError):
    status = 503
    code = "ledger_unavailable"
    headers = RETRY_AFTER
    title = "The ledger is not available"
    meaning = "The database did not take the debit, or rolled it back, and may take it later."
    advice = "Try again after the time in Retry-After."


class Overloaded(PaymentError):
    status = 503
    code = "overloaded"
    headers = RETRY_AFTER
    title = "Too many debits are waiting"
    meaning = (
        "More debits, or more of this user, are waiting or more connections are open than the "
        "service allows."
    )
    advice = "Try again after the time in Retry-After."


class OutcomeUnknown(PaymentError):
    status = 504
    code = "outcome_unknown"
    extension = KeyToAskWith
    money_moved = "unknown"
    title = "Whether the user was charged is not known"
    meaning = (
        "The debit was sent to the database, no response arrived, and retries did not settle it."
    )
    advice = (
        "Ask GET /payments/outcome, or send the same debit again, with the idempotency_key of this "
        "problem; a debit under another key could charge a second time."
    )


class LedgerRejected(PaymentError):
    status = 500
    code = "ledger_rejected"
    title = "The ledger refused the call"
    meaning = "The database rejects the call for a reason that a retry cannot fix."
    advice = "Tell the operator: a migration is missing or the key is wrong."


class InternalError(PaymentError):
    status = 500
    code = "internal_error"
    money_moved = "unknown"
    title = "Internal error"
    meaning = "A fault in this service."
    advice = "Tell the operator, with the request_id."


class PaymentNotFound(PaymentError):
    status = 404
    code = "payment_not_found"
    title = "No outcome is recorded under this key"
    meaning = "The user has neither been charged nor declined under this key."
    advice = "If a debit under this key may still be on its way, send it again with the same key."


class NotFound(PaymentError):
    status = 404
    code = "not_found"
    title = "Not found"
    meaning = "Nothing is served at this path."
    advice = "See /docs for what there is."


class MethodNotAllowed(PaymentError):
    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"
    meaning = "This path is served for other methods; Allow names them."
    advice = "See /docs for what there is."


# The catalogue, in the order of /problems.
PROBLEMS: Mapping[str, type[PaymentError]] = {
    problem.code: problem
    for problem in (
        InvalidRequest,
        RequestTooLarge,
        RequestTimeout,
        UnsupportedEncoding,
        HeadersTooLarge,
        MalformedRequest,
        Unauthenticated,
        Forbidden,
        AuthenticationUnavailable,
        UserNotFound,
        IdempotencyKeyReused,
        UserInactive,
        ItemNotFound,
        ItemInactive,
        PriceChanged,
        InsufficientFunds,
        ProductsUnavailable,
        LedgerUnavailable,
        Overloaded,
        OutcomeUnknown,
        LedgerRejected,
        InternalError,
        PaymentNotFound,
        NotFound,
        MethodNotAllowed,
    )
}
