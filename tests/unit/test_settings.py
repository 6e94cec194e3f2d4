"""The environment is read strictly, and what is wrong is told without telling secrets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import make_settings

from app.settings import Settings, SettingsError, load_settings

ROOT = Path(__file__).parent.parent.parent
RIGHT = {
    "SUPABASE_URL": "https://abc.supabase.co/",
    "SUPABASE_SERVICE_ROLE_KEY": "secret-key",
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
    assert settings.supabase_service_role_key.get_secret_value() == "secret-key"
    assert settings.products_service_url == "http://products:8001"
    assert settings.log_level == "INFO"


def test_a_file_named_dotenv_is_read_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SUPABASE_URL")
    (tmp_path / ".env").write_text("SUPABASE_URL=https://from-file.supabase.co\n")
    assert load_settings().supabase_url == "https://from-file.supabase.co"


def test_every_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RIGHT:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    for name in RIGHT:
        assert f"{name}: Field required" in str(raised.value)


def test_an_unknown_setting_in_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LOG_LEVLE=DEBUG\n")
    with pytest.raises(SettingsError, match="LOG_LEVLE: Extra inputs are not permitted"):
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
        ("SUPABASE_SERVICE_ROLE_KEY", "secret key"),
        ("SUPABASE_SERVICE_ROLE_KEY", "secret\nkey"),
        ("SUPABASE_SERVICE_ROLE_KEY", "sb_publishable_abc"),
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
def test_a_wrong_setting_is_named_and_its_value_is_not_told(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    assert f"  {name}: " in str(raised.value)
    assert "secret" not in str(raised.value).replace("SUPABASE_SERVICE_ROLE_KEY", "")


def test_origins_are_read_as_browsers_send_them(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = "https://Kiosk.example.org:443, http://localhost:3000,http://shop.example.org:80"
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", origins)
    assert load_settings().cors_allowed_origins == (
        *("https://kiosk.example.org", "http://localhost:3000", "http://shop.example.org"),
    )


def test_white_space_around_a_key_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", " secret-key\n")
    assert load_settings().supabase_service_role_key.get_secret_value() == "secret-key"


def test_settings_never_print_the_key() -> None:
    assert "eyJ" not in repr(make_settings())


def test_the_example_file_has_every_setting_with_a_comment() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    named = [match[1] for line in lines if (match := re.match(r"#? ?([A-Z_]+)=", line))]
    assert named == [name.upper() for name in Settings.model_fields]
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


def test_a_start_without_settings_ends_with_one_clear_message(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert ended.returncode not in (0, None)
    assert "Traceback" not in ended.stderr
    for name in RIGHT:
        assert f"{name}: Field required" in ended.stderr
