"""The environment is read strictly, and what is wrong is told without telling secrets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jwt
import pytest
from servers import make_settings

from app.environment.variables import SettingsError
from app.settings import (
    Settings,
    load_settings,
    warn_of_risks,
    warn_of_unknown_names,
)
from devstack.keys import ANON_KEY

ROOT = Path(__file__).parent.parent.parent
RIGHT = {
    "SUPABASE_URL": "https://abc.supabase.co/",
    "SUPABASE_KEY": "secret-key",
    "PRODUCTS_SERVICE_URL": "http://products:8001",
}


@pytest.fixture(autouse=True)
def _right_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in RIGHT.items():
        monkeypatch.setenv(name, value)


def test_the_environment_is_read() -> None:
    settings = load_settings()
    assert settings.supabase_url == "https://abc.supabase.co"
    assert settings.supabase_key.get_secret_value() == "secret-key"
    assert settings.products_service_url == "http://products:8001"
    assert settings.log_level == "INFO"


def test_a_dotenv_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SUPABASE_URL")
    (tmp_path / ".env").write_text("SUPABASE_URL=https://from-file.supabase.co\n")
    assert load_settings().supabase_url == "https://from-file.supabase.co"


def test_the_key_may_be_named_supabase_service_role_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUPABASE_KEY")
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "secret-key")
    assert load_settings().supabase_key.get_secret_value() == "secret-key"


def test_every_missing_setting_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RIGHT:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    for name in RIGHT:
        assert f"{name}: Field required" in str(raised.value)


def test_the_alias_may_repeat_the_key_but_not_differ_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "secret-key")
    assert load_settings().supabase_key.get_secret_value() == "secret-key"
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "secret-key-2")
    with pytest.raises(SettingsError, match="SUPABASE_KEY: differs from SUPABASE_SERVICE_ROLE_KEY"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SUPABASE_URL", "abc.supabase.co"),
        ("SUPABASE_URL", "ftp://abc.supabase.co"),
        ("SUPABASE_URL", "https://"),
        ("SUPABASE_URL", "https://abc.supabase.co:port"),
        ("SUPABASE_URL", "https://abc.supabase.co/rest/v1"),
        ("SUPABASE_URL", "https://abc.supabase.co/?key=secret"),
        ("SUPABASE_URL", "https://user:secret@abc.supabase.co"),
        ("SUPABASE_URL", "https://abc.supa base.co"),
        ("SUPABASE_URL", "https://abc.supabase.co/auth/v1"),
        ("SUPABASE_URL", "https://abc.supabase.co/secret"),
        ("SUPABASE_URL", "https://https://abc.supabase.co"),
        ("SUPABASE_URL", "https://abc.supabase.co:0"),
        ("SUPABASE_URL", "https://[abc.supabase.co"),
        ("SUPABASE_URL", "postgresql://postgres:secret@db.abc.supabase.co:5432/postgres"),
        ("SUPABASE_URL", "https://db.abc.supabase.co"),
        ("SUPABASE_URL", "https://supabase.com/dashboard/project/abc"),
        ("SUPABASE_URL", "https://your-project.supabase.co"),
        ("SUPABASE_URL", "https://<ref>.supabase.co"),
        ("SUPABASE_KEY", "your-key"),
        ("SUPABASE_KEY", "YOUR_SUPABASE_KEY"),
        ("SUPABASE_KEY", "<service_role key>"),
        ("SUPABASE_KEY", "sb_secret_..."),
        ("SUPABASE_KEY", "${SECRET}"),
        ("SUPABASE_KEY", "sbp_0123456789abcdef"),
        ("SUPABASE_KEY", ANON_KEY),
        ("PRODUCTS_SERVICE_URL", "http://products:8001/items"),
        ("PRODUCTS_SERVICE_TOKEN", ""),
        ("PRODUCTS_SERVICE_TOKEN", "Bearer secret"),
        ("PRODUCTS_SERVICE_TOKEN", "${SECRET}"),
        ("PRODUCT_SERVICE_TOKEN", "secret"),
        ("PRODUCTS_SERVICE_TOKN", "secret"),
        ("PRODUCTS_CACHE_SECONDS", "NaN"),
        ("PRODUCTS_CACHE_SECONDS", "inf"),
        ("PRODUCTS_CACHE_SECONDS", "1e9"),
        ("PRODUCTS_CACHE_SECONDS", "5s"),
        ("PRODUCTS_CACHE_SECONDS", "5 # secret"),
        ("DEBITS_WAITING_MAX", "many"),
        ("DEBITS_WAITING_MAX", "0"),
        ("AUTH_JWKS_URL", ""),
        ("AUTH_AUDIENCES", "payment-service"),
        ("AUTH_SECRET", "secret"),
        ("SUPABASE_KEY", "secret key"),
        ("SUPABASE_KEY", "secret\nkey"),
        ("SUPABASE_KEY", "sb_publishable_abc"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318/v1/traces"),
        ("PRODUCTS_SERVICE_URL", "products:8001"),
        ("CORS_ALLOWED_ORIGINS", "*"),
        ("CORS_ALLOWED_ORIGINS", "null"),
        ("CORS_ALLOWED_ORIGINS", "kiosk.example.org"),
        ("CORS_ALLOWED_ORIGINS", "https://kiosk.example.org/"),
        ("CORS_ALLOWED_ORIGINS", "https://kiosk.example.org/secret"),
        ("CORS_ALLOWED_ORIGINS", "https://a.example.org https://b.example.org"),
        ("CORS_ALLOWED_ORIGINS", "https://a.example.org,"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_an_invalid_setting_is_reported_without_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    assert f"  {name}: " in str(raised.value)
    told = str(raised.value).replace("secret key", "").replace("AUTH_SECRET", "")
    assert "secret" not in told


def test_origins_are_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = "https://Kiosk.example.org:443, http://localhost:3000,http://shop.example.org:80"
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", origins)
    assert load_settings().cors_allowed_origins == (
        *("https://kiosk.example.org", "http://localhost:3000", "http://shop.example.org"),
    )


def test_whitespace_around_the_key_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_KEY", " secret-key\n")
    assert load_settings().supabase_key.get_secret_value() == "secret-key"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("abc.supabase.co", "with its scheme, such as https://<ref>.supabase.co"),
        ("postgresql://postgres@abc.supabase.co/postgres", "is the address of the database"),
        ("https://supabase.com/dashboard/project/abc", "is a page of the dashboard"),
        ("https://abc.supabase.co/rest/v1/", "without /rest/v1"),
        ("https://user:pass@abc.supabase.co", "should not hold a user name or password"),
    ],
)
def test_an_invalid_supabase_url_is_rejected_with_advice(
    monkeypatch: pytest.MonkeyPatch, value: str, told: str
) -> None:
    monkeypatch.setenv("SUPABASE_URL", value)
    with pytest.raises(SettingsError, match=re.escape(told)):
        load_settings()


def test_a_key_of_another_project_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = {"iss": "supabase", "ref": "def", "role": "service_role"}
    key = jwt.encode(claims, "a secret of thirty-two characters")
    monkeypatch.setenv("SUPABASE_KEY", key)
    with pytest.raises(SettingsError, match="SUPABASE_KEY is the key of another project"):
        load_settings()
    monkeypatch.setenv("SUPABASE_URL", "https://def.supabase.co")
    assert load_settings().supabase_key.get_secret_value() == key


@pytest.mark.parametrize("quote", ['"', "'", ""])
@pytest.mark.parametrize("around", ["", " ", "\n", "\r\n"])
def test_quotes_and_whitespace_around_every_value_are_removed(
    monkeypatch: pytest.MonkeyPatch, quote: str, around: str
) -> None:
    values = RIGHT | {"LOG_LEVEL": "ERROR", "DEBITS_WAITING_MAX": "7", "AUTH_JWKS_URL": "https://a"}
    for name, value in values.items():
        monkeypatch.setenv(name, f"{quote}{value}{quote}{around}")
    settings = load_settings()
    assert settings.supabase_url == "https://abc.supabase.co"
    assert settings.supabase_key.get_secret_value() == "secret-key"
    assert (settings.log_level, settings.debits_waiting_max) == ("ERROR", 7)
    assert settings.auth_jwks_url == "https://a"


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("LOG_LEVEL", "info", "INFO"),
        ("LOG_LEVEL", "Warning", "WARNING"),
        ("SUPABASE_URL", "HTTPS://ABC.supabase.co", "https://abc.supabase.co"),
        ("SUPABASE_URL", "http://[::1]:54321/", "http://[::1]:54321"),
        ("PRODUCTS_SERVICE_URL", "Http://Products/Shop", "http://products/Shop"),
        ("DEBITS_WAITING_MAX", "1_000", 1000),
        ("PRODUCTS_CACHE_SECONDS", "0", 0),
    ],
)
def test_other_spellings_are_accepted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, meant: object
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(load_settings(), name.lower()) == meant


FILE = "\n".join(f"{name}={value}" for name, value in RIGHT.items()) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        FILE.encode("utf-8-sig"),
        FILE.replace("\n", "\r\n").encode(),
        FILE.replace("SUPABASE", "export SUPABASE").encode(),
        FILE.replace("=", " = ").encode(),
        re.sub("=(.*)", r'="\1"  # a comment', FILE).encode(),
        f"# Bättre Bosh\nCOMPOSE_PROJECT_NAME=shop\n{FILE}".encode(),
        f"a line of another program\n{FILE}".encode(),
    ],
)
def test_common_forms_of_a_dotenv_file_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    for name in RIGHT:
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_bytes(content)
    settings = load_settings()
    assert settings.supabase_url == "https://abc.supabase.co"
    assert settings.supabase_key.get_secret_value() == "secret-key"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            f"# Bättre Bosh\n{FILE}".encode("latin-1"),
            "not UTF-8 text, see line 1. Save it as UTF-8",
        ),
        (FILE.encode("utf-16"), "Save it as UTF-8"),
        (FILE.encode("utf-16-le"), "Save it as UTF-8"),
        (FILE.encode() + b"\0", "Save it as UTF-8"),
        (b'LOG_LEVEL=INFO\n\nSUPABASE_KEY="abc\n', "has a line 3 that is not NAME=value"),
        (b"SUPABASE_URL: https://abc.supabase.co\n", "has a line 1 that is not NAME=value"),
    ],
)
def test_an_unreadable_dotenv_file_stops_the_start_and_is_reported(
    tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape(told)) as raised:
        load_settings()
    assert str(tmp_path / ".env") in str(raised.value)


def test_a_folder_named_dotenv_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"\.env is a folder"):
        load_settings()


def test_a_broken_dotenv_symlink_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / ".env")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LOG_LEVLE", "LOG_LEVEL"),
        ("PRODUCTS_CACHE_SECOND", "PRODUCTS_CACHE_SECONDS"),
        ("PRODUCTS_URL", "PRODUCTS_SERVICE_URL"),
        ("NEXT_PUBLIC_SUPABASE_URL", "SUPABASE_URL"),
        ("SUPABASE_SERVICE_KEY", "SUPABASE_KEY"),
        ("COMPOSE_PROJECT_NAME", None),
        ("SUPABASE_ANON_KEY", None),
        ("PRODUCTS_SERVICE_PORT", None),
        ("PRODUCTS_SERVICE_SERVICE_HOST", None),
        ("PATH", None),
    ],
)
@pytest.mark.parametrize("place", [".env", "the environment"])
def test_a_misspelled_setting_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    meant: str | None,
    place: str,
) -> None:
    if place == ".env":
        (tmp_path / ".env").write_text(f"{name}=hidden\n")
    else:
        monkeypatch.setenv(name, "hidden")
    load_settings()
    warn_of_unknown_names()
    told = [line for line in caplog.messages if line.startswith(f"{name} ")]
    assert [line.endswith(f"; is {meant} meant?") for line in told] == ([True] if meant else [])
    assert "hidden" not in caplog.text


def test_plain_http_to_supabase_is_a_warning_except_on_loopback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for address, warned in (("http://localhost:54321", False), ("http://kong:8000", True)):
        monkeypatch.setenv("SUPABASE_URL", address)
        warn_of_risks(load_settings())
        assert ("SUPABASE_URL begins with http://" in caplog.text) is warned


def test_the_jwks_url_requires_https_unless_plain_http_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTH_JWKS_URL", "http://keycloak:8080/certs")
    with pytest.raises(SettingsError, match="AUTH_PLAIN_HTTP_ALLOWED=true allows"):
        load_settings()
    monkeypatch.setenv("AUTH_PLAIN_HTTP_ALLOWED", "true")
    assert load_settings().auth_jwks_url == "http://keycloak:8080/certs"


def test_library_variables_may_be_in_the_dotenv_file_and_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", '"shop"')
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("NO_PROXY")
    (tmp_path / ".env").write_text("NO_PROXY='.internal'\nOTEL_SERVICE_NAME=other\n")
    load_settings()
    assert (os.environ["NO_PROXY"], os.environ["OTEL_SERVICE_NAME"]) == (".internal", "shop")
    assert "OTEL_BSP_MAX_QUEUE_SIZE" not in os.environ


def test_settings_never_print_the_key() -> None:
    assert "eyJ" not in repr(make_settings())


def test_the_example_file_has_every_setting_with_a_comment() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    named = [match[1] for line in lines if (match := re.match(r"#? ?([A-Z_]+)=", line))]
    assert sorted(named) == sorted(name.upper() for name in Settings.model_fields)
    for number, line in enumerate(lines):
        if re.match(r"#? ?[A-Z_]+=", line):
            assert re.match(r"# \w.*\.", lines[number - 1]), f"{line} needs a comment"


def test_the_example_file_starts_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RIGHT:
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_bytes((ROOT / ".env.example").read_bytes())
    assert load_settings()


def test_importing_the_application_needs_no_environment(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", "import app.main"], env=environment, cwd=tmp_path, check=True
    )


def start(tmp_path: Path, **environment: str) -> str:
    """Start the service, which should end by itself; returns what it wrote."""
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode not in (0, None)
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_a_start_without_settings_ends_with_one_clear_message(tmp_path: Path) -> None:
    told = start(tmp_path)
    for name in RIGHT:
        assert f"{name}: Field required" in told


TRACED = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": "/etc/hostname"}, "SSL_CERT_FILE"),
        ({"SSL_CERT_DIR": "/nowhere"}, "SSL_CERT_DIR"),
        ({"REQUESTS_CA_BUNDLE": "/nowhere.pem"} | TRACED, "REQUESTS_CA_BUNDLE"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "many"} | TRACED, "OTEL_BSP_MAX_QUEUE_SIZE"),
        ({"OTEL_BSP_SCHEDULE_DELAY": "5s"} | TRACED, "OTEL_BSP_SCHEDULE_DELAY"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "5"} | TRACED, "OTEL_BSP_MAX_QUEUE_SIZE"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"} | TRACED, "OTEL_EXPORTER_OTLP_TIMEOUT"),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "x"} | TRACED, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ({"OTEL_TRACES_SAMPLER": "sometimes"} | TRACED, "OTEL_TRACES_SAMPLER"),
        ({"OTEL_TRACES_SAMPLER_ARG": "10 %"} | TRACED, "OTEL_TRACES_SAMPLER_ARG"),
        ({"HTTPS_PROXY": "socks5://127.0.0.1:1080"}, "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "http://127.0.0.1:port"}, "HTTPS_PROXY"),
    ],
)
def test_an_invalid_library_variable_stops_the_start_and_is_reported(
    tmp_path: Path, wrong: dict[str, str], named: str
) -> None:
    assert named in start(tmp_path, **RIGHT, **wrong)


def test_a_file_in_another_encoding_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(f"# Bättre Bosh\n{FILE}".encode("latin-1"))
    assert f"{tmp_path / '.env'} is not UTF-8 text" in start(tmp_path)
