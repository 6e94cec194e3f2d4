"""The types of settings; an error message says what to write instead, and repeats no value."""

import base64
import json
import re
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints

EXAMPLE = "https://service.example.org"
PROJECT = "https://<ref>.supabase.co"
PLACEHOLDER = re.compile(
    r"[<>{}…]|^\[.*\]$|\.\.\.|changeme|change[-_]me|placeholder|^x+$|xxxx"
    r"|(?<![a-z])your([-_]|key|project|ref|secret|service|supabase)"
    r"|^(supabase[-_])?(service[-_]role|secret|anon)?[-_]?key[-_]here$|^service[-_]role[-_]key$",
    re.IGNORECASE,
)
# Paths in addresses that the dashboard shows; the client adds them itself.
API_PATH = re.compile(r"/(rest|auth|storage|functions|graphql|realtime)(/|$)")
HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:.%]+")
ROLES_REFUSED = ("anon", "authenticated")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _web_address(address: str) -> str:
    """Return the address with scheme and host in lower case."""
    parts = _split(address)
    host, port = parts.hostname or "", _port(parts)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"should be an address with its scheme, such as {EXAMPLE}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("should not hold a user name or password")
    if not HOST.fullmatch(host) or port == 0 or parts.path.startswith("//") or parts.fragment:
        raise ValueError(f"should be an address such as {EXAMPLE}")
    normal = urlunsplit(parts._replace(netloc=parts.netloc.lower()))
    try:
        httpx.URL(normal)
    except httpx.InvalidURL:
        raise ValueError(f"should be an address such as {EXAMPLE}") from None
    return normal


def _split(address: str) -> SplitResult:
    if any(character.isspace() for character in address):
        raise ValueError("should be an address without white space")
    try:
        return urlsplit(address)
    except ValueError:
        raise ValueError(f"should be an address such as {EXAMPLE}") from None


def _port(parts: SplitResult) -> int | None:
    try:
        port = parts.port
    except ValueError:
        raise ValueError("should be an address with a port of 1 to 65535, or without one") from None
    return 0 if port is None and parts.netloc.endswith(":") else port


def _service_address(address: str) -> str:
    normal = _web_address(address)
    if "?" in normal:
        raise ValueError("should be an address without a query")
    return normal.rstrip("/")


def _products_address(address: str) -> str:
    normal = _service_address(address)
    if normal.endswith("/items"):
        raise ValueError("should be the service's address without /items")
    return normal


def _project_address(address: str) -> str:
    if PLACEHOLDER.search(address):
        raise ValueError(f"is still a placeholder; should be the project's address, {PROJECT}")
    parts = _split(address)
    host = parts.hostname or ""
    if parts.scheme.startswith("postgres") or re.match(r"db\.\w+\.supabase\.co$", host):
        raise ValueError(f"is the address of the database; should be the project's, {PROJECT}")
    if host in ("supabase.com", "www.supabase.com", "app.supabase.com", "app.supabase.io"):
        raise ValueError(
            f"is a page of the dashboard; should be {PROJECT}, where <ref> is the part after "
            "/project/"
        )
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"should be an address with its scheme, such as {PROJECT}")
    if API_PATH.search(parts.path):
        raise ValueError("should be the project's address without /rest/v1 or another path")
    if host.endswith(".supabase.co") and parts.path.strip("/"):
        raise ValueError(f"should be the project's address without a path, {PROJECT}")
    return _service_address(address)


def _collector_address(address: str) -> str:
    if address.endswith("/v1/traces"):
        raise ValueError("should be the collector's address without /v1/traces")
    return address


def _supabase_key(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value().strip()
    if not text or not all("!" <= character <= "~" for character in text):
        raise ValueError("should be one line of visible ASCII characters without spaces")
    if text.startswith("sb_publishable_"):
        raise ValueError("should be the key of the role service_role; this is the publishable one")
    if text.startswith("sbp_"):
        raise ValueError(
            "should be the project's secret key; this is an access token of a Supabase account"
        )
    role = key_claims(text).get("role")
    if role in ROLES_REFUSED:
        raise ValueError(f"should be the key of the role service_role; this is the key of {role}")
    if not key_claims(text) and PLACEHOLDER.search(text):
        raise ValueError("is still a placeholder; should be a secret key of the project")
    return SecretStr(text)


def _service_token(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value().strip()
    if not text or not all("!" <= character <= "~" for character in text):
        raise ValueError(
            "should be one line of visible ASCII characters without spaces, and without Bearer"
        )
    if PLACEHOLDER.search(text):
        raise ValueError("is still a placeholder; should be a token for the products service")
    return SecretStr(text)


def key_claims(key: str) -> dict[str, Any]:
    """Return the claims of a key in the older format (JWT); an empty dict for other keys."""
    _, _, rest = key.partition(".")
    payload, _, _ = rest.partition(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _in_capitals(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
InCapitals = BeforeValidator(_in_capitals)
Seconds = Annotated[float, Field(allow_inf_nan=False)]
KeysAddress = Annotated[Name, AfterValidator(_web_address)]
ProjectAddress = Annotated[Name, AfterValidator(_project_address)]
ProductsAddress = Annotated[Name, AfterValidator(_products_address)]
CollectorAddress = Annotated[
    Name, AfterValidator(_service_address), AfterValidator(_collector_address)
]
SupabaseKey = Annotated[SecretStr, AfterValidator(_supabase_key)]
ServiceToken = Annotated[SecretStr, AfterValidator(_service_token)]


def _split_list(text: object) -> object:
    return text.split(",") if isinstance(text, str) else text


def _origin(text: str) -> str:
    """Return an origin as browsers send it: in lower case, without the scheme's default port."""
    origin = text.strip().lower()
    parts = urlsplit(_web_address(origin)) if origin != "*" else None
    if parts is None or origin != f"{parts.scheme}://{parts.netloc}" or not origin.isascii():
        raise ValueError(
            "should be origins such as https://kiosk.example.org, separated by commas, without "
            "paths; * is not allowed, because any web page could then charge cards"
        )
    default_port = {"http": ":80", "https": ":443"}[parts.scheme]
    return origin.removesuffix(default_port)


Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split_list)
]
