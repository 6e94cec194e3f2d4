"""The settings, read from the environment at startup."""

import logging
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.environment.types import (
    CollectorAddress,
    InCapitals,
    KeysAddress,
    Name,
    Origins,
    ProductsAddress,
    ProjectAddress,
    Seconds,
    ServiceToken,
    SupabaseKey,
    is_loopback,
    key_claims,
)
from app.environment.variables import (
    CANNOT_START,
    SERVICE_LINK,
    Environment,
    SettingsError,
    find_meant,
    read_environment,
)

ALIASES = {"SUPABASE_SERVICE_ROLE_KEY": "SUPABASE_KEY"}
# Messages that say what to write; those of pydantic do not.
MESSAGES = {
    "float_parsing": "should be a number without a unit, such as 5",
    "finite_number": "should be a finite number, such as 5",
    "int_parsing": "should be a whole number without a unit, such as 64",
    "bool_parsing": "should be true or false",
}

logger = logging.getLogger(__package__)


class Settings(BaseSettings):
    """Settings from the environment or from `.env`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    supabase_url: ProjectAddress = Field(description="Address of the Supabase project.")
    supabase_key: SupabaseKey = Field(
        description="Secret key of the project, or its service_role key. Keep it secret."
    )
    products_service_url: ProductsAddress = Field(description="Address of the products service.")
    products_service_token: ServiceToken | None = Field(
        None, description="Token for the products service. Without it, the caller's token is sent."
    )
    products_cache_seconds: Seconds = Field(
        5.0, ge=0, le=60, description="How long a response about an item is used again."
    )
    debit_batch_size_max: int = Field(
        64,
        ge=1,
        le=64,
        description="Maximum of debits in one call to the ledger; 1 sends each alone.",
    )
    debits_waiting_max: int = Field(
        1000, ge=1, le=100_000, description="Maximum of debits at a time. More get overloaded."
    )
    request_timeout_seconds: Seconds = Field(
        8.0, ge=1, le=15, description="Time within which a request gets its response."
    )
    auth_jwks_url: KeysAddress | None = Field(
        None, description="Address of the keys of the token issuer. Turns authentication on."
    )
    auth_issuer: Name | None = Field(None, description="The required iss of a token.")
    auth_audience: Name | None = Field(None, description="The required aud of a token.")
    auth_required_role: Name | None = Field(
        None, description="The role or scope that a token must have."
    )
    auth_plain_http_allowed: bool = Field(
        False, description="Allows http:// in AUTH_JWKS_URL for another machine."
    )
    cors_allowed_origins: Origins = Field(
        (), description="Origins of web pages whose scripts may call the service."
    )
    otel_exporter_otlp_endpoint: CollectorAddress | None = Field(
        None, description="Address of a collector of traces (OTLP over HTTP). Turns traces on."
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], InCapitals] = Field(
        "INFO", description="The lowest level of log events."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use read_environment only: the sources of pydantic keep quotes around values."""
        return (init_settings,)

    @model_validator(mode="after")
    def _no_rules_without_keys(self) -> Self:
        rules = (self.auth_issuer, self.auth_audience, self.auth_required_role)
        if self.auth_jwks_url is None and (any(rules) or self.auth_plain_http_allowed):
            raise ValueError("AUTH_JWKS_URL is missing: the other AUTH_ settings need it")
        return self

    @model_validator(mode="after")
    def _keys_come_encrypted(self) -> Self:
        # An attacker who can change the keys in transit can sign tokens that the service accepts.
        if (
            self.auth_jwks_url
            and not self.auth_plain_http_allowed
            and _is_unencrypted(self.auth_jwks_url)
        ):
            raise ValueError(
                "AUTH_JWKS_URL should begin with https://. AUTH_PLAIN_HTTP_ALLOWED=true allows "
                "http:// in a network that you trust"
            )
        return self

    @model_validator(mode="after")
    def _key_is_of_the_project(self) -> Self:
        host = urlsplit(self.supabase_url).hostname or ""
        project = key_claims(self.supabase_key.get_secret_value()).get("ref")
        if project and host.endswith(".supabase.co") and host != f"{project}.supabase.co":
            raise ValueError(
                "SUPABASE_KEY is the key of another project, not of the project at SUPABASE_URL"
            )
        return self


KNOWN_NAMES = frozenset({*ALIASES, *(name.upper() for name in Settings.model_fields)})


def load_settings() -> Settings:
    """Return the settings from the environment and from `.env`.

    Raises:
        SettingsError: settings are missing or invalid; the message names each.
    """
    environment = read_environment(KNOWN_NAMES)
    values, problems = _resolve_aliases(environment.values)
    problems += _auth_problems(environment)
    try:
        settings = Settings(**{name.lower(): value for name, value in values.items()})  # type: ignore[arg-type]  # text
    except ValidationError as error:
        problems += _messages(error, values)
    if problems:
        raise SettingsError(
            f"{CANNOT_START}. These settings are missing or invalid, in the environment or in .env "
            "(.env.example explains them):\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return settings


def warn_of_unknown_names() -> None:
    """Log a warning for each name in the environment that looks like a misspelled setting."""
    for name, place in read_environment(KNOWN_NAMES).unknown.items():
        if meant := find_meant(name, KNOWN_NAMES):
            logger.warning(
                "%s in %s is not a setting of this service and is ignored; is %s meant?",
                name,
                place,
                ALIASES.get(meant, meant),
            )


def warn_of_risks(settings: Settings) -> None:
    """Log a warning for each setting that is a risk to balances or to the key."""
    if _is_unencrypted(settings.supabase_url):
        logger.warning(
            "SUPABASE_URL begins with http://: the key is sent without encryption. Use https://"
        )
    if settings.auth_jwks_url is None:
        logger.warning(
            "authentication is off: every caller can charge every user. Set AUTH_JWKS_URL to turn "
            "it on"
        )
        return
    if settings.auth_required_role is None:
        logger.warning(
            "AUTH_REQUIRED_ROLE is not set: every token of the issuer allows its owner to charge "
            "every user"
        )
    if settings.auth_audience is None:
        logger.warning(
            "AUTH_AUDIENCE is not set: a token that was issued for another service allows its "
            "owner to charge every user"
        )
    if settings.products_service_token is None:
        logger.warning(
            "the products service gets the callers' tokens and can charge every user with them. "
            "Set PRODUCTS_SERVICE_TOKEN to send its own token instead"
        )


def _resolve_aliases(given: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    values, problems = dict(given), []
    for alias, name in ALIASES.items():
        if alias in values and values.setdefault(name, values[alias]) != values.pop(alias):
            problems.append(f"{name}: differs from {alias}, which is the same setting. Remove one")
    return values, problems


def _auth_problems(environment: Environment) -> list[str]:
    """Return the problems of empty and unknown settings about tokens.

    An AUTH_ rule that is empty or misspelled would admit callers without the rule. Without
    PRODUCTS_SERVICE_TOKEN, the callers' tokens leave this service.
    """
    empty = [
        f"{name}: is empty. Give it a value or remove it"
        for name in sorted(environment.empty)
        if _is_about_tokens(name)
    ]
    ours = [name for name in KNOWN_NAMES if _is_about_tokens(name)]
    unknown = []
    for name, place in environment.unknown.items():
        meant = find_meant(name, ours)
        is_ours = name.startswith("AUTH_") or ("TOK" in name and meant == "PRODUCTS_SERVICE_TOKEN")
        if is_ours and not SERVICE_LINK.fullmatch(name):
            advice = f"is {meant} meant?" if meant else "correct its name or remove it"
            unknown.append(f"{name}: is in {place}, but is not a setting of this service; {advice}")
    return [*empty, *unknown]


def _is_about_tokens(name: str) -> bool:
    return name.startswith("AUTH_") or name == "PRODUCTS_SERVICE_TOKEN"


def _messages(error: ValidationError, values: dict[str, str]) -> list[str]:
    messages = []
    for problem in error.errors(include_url=False, include_input=False):
        names = [str(part).upper() for part in problem["loc"]]
        message = MESSAGES.get(problem["type"], problem["msg"])
        if any(" #" in values.get(name, "") for name in names):
            message += " (a comment needs a line of its own)"
        messages.append(": ".join([*names, message]))
    return messages


def _is_unencrypted(address: str) -> bool:
    """Return whether requests to an address leave this machine without encryption."""
    parts = urlsplit(address)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")
