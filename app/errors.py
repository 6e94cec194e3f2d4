"""Problems: the ways in which a request can fail. Each class defines its HTTP response."""

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
    """A problem that the caller receives (RFC 9457).

    `detail` describes this occurrence; without it, the title is used. `members` are the values of
    the fields that `extension` declares: the members that a code adds to the body of a problem.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    advice: ClassVar[str]
    money_moved: ClassVar[Literal["no", "unknown"]] = "no"
    extension: ClassVar[type[BaseModel] | None] = None
    example_detail: ClassVar[str | None] = None  # of the examples in the OpenAPI document
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str | None = None, **members: object) -> None:
        super().__init__(detail or self.title)
        self.members = members
        self.replayed = False


class FieldFault(BaseModel):
    """A fault in a request: its place and its description."""

    detail: str
    pointer: str | None = Field(None, description="The field of the body, as a JSON Pointer.")
    parameter: str | None = Field(None, description="The name of the path or query parameter.")
    header: str | None = Field(None, description="The name of the header.")


class Faults(BaseModel):
    """The members that `invalid_request` adds to a problem."""

    errors: list[FieldFault] = Field(
        description="the faults of the request, at most 20.",
        examples=[[{"pointer": "#/user_id", "detail": "Field required"}]],
    )


class CurrentPrice(BaseModel):
    """The members that `price_changed` adds to a problem."""

    price: int = Field(description="the current price.", examples=[350])


class KeyOfDebit(BaseModel):
    """The members that `outcome_unknown` adds to a problem."""

    idempotency_key: str = Field(
        description="the key for the lookup or the retry.", examples=[EXAMPLE_KEY]
    )


class InvalidRequest(PaymentError):
    status = 422
    code = "invalid_request"
    extension = Faults
    example_detail = "The body is not as documented"
    title = "Invalid request"
    meaning = (
        "The body, the path, the query or a header does not match the documentation; errors "
        "lists each fault."
    )
    advice = "Correct the request. The same request gets the same problem again."


class RequestTooLarge(PaymentError):
    status = 413
    code = "request_too_large"
    title = "Request too large"
    meaning = "The body is larger than 16 KiB."
    advice = "Send only the documented fields."


class RequestTimeout(PaymentError):
    status = 408
    code = "request_timeout"
    headers = CLOSE
    title = "The request did not arrive in time"
    meaning = "The service did not receive the complete headers or body within 10 seconds."
    advice = "Send the request again, headers and body without a pause."


class UnsupportedEncoding(PaymentError):
    status = 415
    code = "unsupported_encoding"
    headers = IDENTITY
    example_detail = "The body is compressed (gzip); send it in UTF-8, without Content-Encoding"
    title = "The encoding of the body is not supported"
    meaning = "The body is compressed or is not in UTF-8; detail names the encoding."
    advice = "Send JSON in UTF-8, without Content-Encoding."


class HeadersTooLarge(PaymentError):
    status = 431
    code = "headers_too_large"
    title = "Headers too large"
    meaning = (
        "The request line and the headers are larger than 64 KiB, or there are more than 100 "
        "headers, or the address has more than 1,000 percent-encoded characters."
    )
    advice = "Send fewer and shorter headers."


class MalformedRequest(PaymentError):
    status = 400
    code = "malformed_request"
    title = "This is not a valid HTTP/1.1 request"
    meaning = "The request line, a header or the length of the body breaks the rules of HTTP/1.1."
    advice = (
        "Use an HTTP client library. Use https:// only if a proxy in front of the service "
        "speaks TLS."
    )


class Unauthenticated(PaymentError):
    status = 401
    code = "unauthenticated"
    headers = BEARER
    example_detail = "The token is missing: send it as Authorization: Bearer <token>"
    title = "A valid token is needed"
    meaning = "The bearer token is missing or invalid; detail says why."
    advice = "Get a token from the issuer and send it in the header Authorization: Bearer."


class Forbidden(PaymentError):
    status = 403
    code = "forbidden"
    example_detail = "The token lacks the role that payments need"
    title = "The token does not allow this"
    meaning = (
        "The token is valid, but it does not have the required role, or the products service "
        "rejected it."
    )
    advice = "Ask the administrator of the issuer for the role that payments require."


class AuthenticationUnavailable(PaymentError):
    status = 503
    code = "authentication_unavailable"
    headers = RETRY_AFTER
    title = "The token cannot be checked now"
    meaning = (
        "The token is signed with a key that the service does not know yet, and the service "
        "cannot fetch the issuer's keys."
    )
    advice = "Send the request again after the time in Retry-After."


class UserNotFound(PaymentError):
    status = 404
    code = "user_not_found"
    title = "User not found"
    meaning = "No user has the card number in user_id."
    advice = "Check the card number."


class IdempotencyKeyReused(PaymentError):
    status = 422
    code = "idempotency_key_reused"
    title = "The idempotency key was used for another debit"
    meaning = (
        "The key was used before for this user, with another item or another expected price, "
        "or by another client."
    )
    advice = "Create a new key for each new purchase. Use a key again only to retry the same debit."


class UserInactive(PaymentError):
    status = 403
    code = "user_inactive"
    title = "User is not active"
    meaning = "The user is deactivated and cannot pay."
    advice = "Send the customer to the administrator of the cards."


class ItemNotFound(PaymentError):
    status = 404
    code = "item_not_found"
    title = "Item not found"
    meaning = "The products service or the database does not have this item."
    advice = "Check item_id. The database may not have a new item yet."


class ItemInactive(PaymentError):
    status = 409
    code = "item_inactive"
    title = "Item is not for sale"
    meaning = "The item is not for sale, according to the products service or the database."
    advice = "Remove the item from the selection."


class PriceChanged(PaymentError):
    status = 409
    code = "price_changed"
    extension = CurrentPrice
    title = "The price has changed"
    meaning = "The current price differs from expected_price; price is the current price."
    advice = (
        "Show the customer the new price. If the customer agrees, send a new debit with a new key."
    )


class InsufficientFunds(PaymentError):
    status = 402
    code = "insufficient_funds"
    title = "Insufficient funds"
    meaning = "The balance is lower than the price."
    advice = (
        "Ask the customer to top up or to choose a cheaper item. Then send a new debit with a "
        "new key."
    )


class ProductsUnavailable(PaymentError):
    status = 503
    code = "products_unavailable"
    headers = RETRY_AFTER
    title = "The products service is not available"
    meaning = (
        "The products service is down, too slow or returned an invalid response, and no "
        "response from the last minute is cached."
    )
    advice = "Send the same debit again with the same key, after the time in Retry-After."


class LedgerUnavailable(PaymentError):
    status = 503
    code = "ledger_unavailable"
    headers = RETRY_AFTER
    title = "The ledger is not available"
    meaning = "The database did not accept the call or rolled it back; a retry may succeed."
    advice = "Send the same request again with the same key, after the time in Retry-After."


class Overloaded(PaymentError):
    status = 503
    code = "overloaded"
    headers = RETRY_AFTER
    title = "Too many debits are waiting"
    meaning = (
        "Too many debits are waiting, in total or for this user, or too many connections are open."
    )
    advice = "Send the same debit again with the same key, after the time in Retry-After."


class OutcomeUnknown(PaymentError):
    status = 504
    code = "outcome_unknown"
    extension = KeyOfDebit
    money_moved = "unknown"
    title = "It is not known whether the user was charged"
    meaning = (
        "The service sent the debit to the database, got no response, and its retries failed too."
    )
    advice = (
        "Look up the outcome with GET /payments/outcome, or send the same debit again, with "
        "the idempotency_key of this problem. A debit with another key could charge the user a "
        "second time."
    )


class LedgerRejected(PaymentError):
    status = 500
    code = "ledger_rejected"
    title = "The ledger rejected the call"
    meaning = (
        "The database rejects the call for a reason that a retry cannot fix, such as a missing "
        "migration or a wrong key."
    )
    advice = (
        "Report the problem to the operator, with the request_id. Do not retry until it is fixed."
    )


class InternalError(PaymentError):
    status = 500
    code = "internal_error"
    money_moved = "unknown"
    title = "Internal error"
    meaning = "The service has a bug, or it was stopped before the request was finished."
    advice = (
        "Report the problem to the operator, with the request_id. After a debit, look up the "
        "outcome with GET /payments/outcome."
    )


class PaymentNotFound(PaymentError):
    status = 404
    code = "payment_not_found"
    title = "No outcome is stored for this key"
    meaning = "Neither a payment nor a decline is stored for this user and this key."
    advice = (
        "If the customer still wants the item, send the debit again with the same key. If not, ask "
        "again: if nothing is stored a minute after the last request has ended, nobody was charged."
    )


class NotFound(PaymentError):
    status = 404
    code = "not_found"
    title = "Not found"
    meaning = "The service has nothing at this path."
    advice = "See /docs for the operations of the service."


class MethodNotAllowed(PaymentError):
    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"
    meaning = "This path does not support the method; the header Allow lists the methods."
    advice = "See /docs for the operations of the service."


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
