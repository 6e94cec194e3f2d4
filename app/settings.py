"""The environment, read in one place, once, at start."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _web_address(address: str) -> str:
    try:
        parts = urlsplit(address)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named or parts.fragment or any(c.isspace() for c in address):
        raise ValueError("should be an address such as https://service.example.org")
    if parts.username or parts.password:
        raise ValueError("should not hold a user name or password")
    return address


def _service_address(address: str) -> str:
    parts = urlsplit(_web_address(address))
    if parts.query:
        raise ValueError("should be an address without a query")
    if "/rest/v1" in parts.path:
        raise ValueError("should be the project's address without /rest/v1")
    return address.rstrip("/")


def _collector_address(address: str) -> str:
    if address.endswith("/v1/traces"):
        raise ValueError("should be the collector's address without /v1/traces")
    return address


def _header_value(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value().strip()
    if not text or not all("!" <= character <= "~" for character in text):
        raise ValueError("should be one line of visible ASCII characters without spaces")
    if text.startswith("sb_publishable_"):
        raise ValueError("should be the key of the role service_role; this is the publishable one")
    return SecretStr(text)


def _split(text: object) -> object:
    return text.split(",") if isinstance(text, str) else text


def _origin(text: str) -> str:
    """Return an origin as browsers send it: in lower case, without the scheme's own port."""
    origin = text.strip().lower()
    parts = urlsplit(_web_address(origin)) if origin != "*" else None
    if parts is None or origin != f"{parts.scheme}://{parts.netloc}" or not origin.isascii():
        raise ValueError(
            "should be origins such as https://kiosk.example.org, separated by commas, without "
            "paths; * is not allowed, because any web page could then charge cards"
        )
    own_port = {"http": ":80", "https": ":443"}[parts.scheme]
    return origin.removesuffix(own_port)


Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)
]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
KeysAddress = Annotated[Name, AfterValidator(_web_address)]
ServiceAddress = Annotated[Name, AfterValidator(_service_address)]
CollectorAddress = Annotated[ServiceAddress, AfterValidator(_collector_address)]


class SettingsError(Exception):
    """Settings are missing or wrong; the message names each, and never repeats a value."""


class Settings(BaseSettings):
    """What the service is told by its environment or by a file `.env` beside it."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    supabase_url: ServiceAddress = Field(description="Address of the Supabase project.")
    supabase_service_role_key: Annotated[SecretStr, AfterValidator(_header_value)] = Field(
        description="Its key for the role service_role; keep it secret."
    )
    products_service_url: ServiceAddress = Field(description="Address of the products service.")
    products_cache_seconds: float = Field(
        5.0, ge=0, le=60, description="How long an answer about an item is used again."
    )
    debit_batch_size_max: int = Field(
        64, ge=1, le=64, description="Most debits in one call to the ledger; 1 sends each alone."
    )
    debits_waiting_max: int = Field(
        1000, ge=1, le=100_000, description="More debits than this at a time are refused."
    )
    request_timeout_seconds: float = Field(
        8.0, ge=1, le=15, description="After this long a debit is answered, settled or not."
    )
    auth_jwks_url: KeysAddress | None = Field(
        None, description="Where the issuer of tokens publishes its keys; turns authentication on."
    )
    auth_issuer: Name | None = Field(None, description="What a token's iss has to be.")
    auth_audience: Name | None = Field(None, description="What a token's aud has to name.")
    auth_required_role: Name | None = Field(
        None, description="The role or scope that a token has to carry."
    )
    cors_allowed_origins: Origins = Field(
        (), description="Origins of web pages whose scripts may call the service."
    )
    otel_exporter_otlp_endpoint: CollectorAddress | None = Field(
        None, description="A collector of traces that speaks OTLP over HTTP; turns traces on."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="How much is logged."
    )

    @model_validator(mode="after")
    def _no_rules_without_keys(self) -> Self:
        if self.auth_jwks_url is None and (
            self.auth_issuer or self.auth_audience or self.auth_required_role
        ):
            raise ValueError("AUTH_JWKS_URL is missing: without it no other AUTH_ setting applies")
        return self


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: something is missing or wrong.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            "  " + ": ".join([*(str(part).upper() for part in problem["loc"]), problem["msg"]])
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError(
            "The service cannot start. In its environment or in .env these are missing or wrong "
            "(.env.example explains each):\n" + "\n".join(problems)
        ) from None
