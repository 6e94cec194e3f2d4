"""The image contains only the service and its requirements."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from servers import free_port, make_settings, served

from app.main import create_app
from app.server.server import make_config

ROOT = Path(__file__).parent.parent.parent
PINNED = "python:3.11-slim@sha256:x"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def final_stage() -> list[tuple[str, str]]:
    start = max(at for at, (name, _) in enumerate(instructions()) if name == "FROM")
    return instructions()[start:]


def health_check() -> list[str]:
    (line,) = arguments("HEALTHCHECK")
    command: list[str] = json.loads(line.partition("CMD ")[2])
    return command


def check_health(url: str) -> int:
    """Run the image's health check without packages and with an unreachable proxy."""
    code = health_check()[2].replace("http://127.0.0.1:8002", url)
    dead_proxy = {"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(
        command, env=os.environ | dead_proxy, stderr=subprocess.DEVNULL, timeout=60, check=False
    ).returncode


def test_both_stages_use_the_slim_image() -> None:
    assert pinned_images() in (["python:3.11-slim"] * 2, [PINNED] * 2)


def pinned_images() -> list[str]:
    """Return the base image of each stage, with x as the digest if there is one."""
    names = [stage.split()[0] for stage in arguments("FROM")]
    assert len(set(names)) == 1
    return [re.sub(r"@sha256:[0-9a-f]{64}$", "@sha256:x", name) for name in names]


def test_make_pins_the_base_image_to_the_digest_from_docker(tmp_path: Path) -> None:
    for name in ("Makefile", "Dockerfile"):
        shutil.copy(ROOT / name, tmp_path)
    docker = tmp_path / "docker"
    pins = []
    for letter in "ab":
        docker.write_text(f"#!/bin/sh\necho sha256:{letter * 64}\n")
        docker.chmod(0o755)
        make(tmp_path, "pin-image")
        text = (tmp_path / "Dockerfile").read_text()
        pins.append(re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert pins == [[f"python:3.11-slim@sha256:{letter * 64}"] * 2 for letter in "ab"]
    docker.write_text("#!/bin/sh\necho ERROR: unauthorized\n")
    assert make(tmp_path, "pin-image", check=False) != 0
    assert (tmp_path / "Dockerfile").read_text() == text


def make(folder: Path, target: str, *, check: bool = True) -> int:
    path = f"{folder}:{os.environ['PATH']}"
    command = ["make", "--silent", target]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, check=check, timeout=60
    ).returncode


def test_only_the_service_and_its_requirements_are_copied() -> None:
    copied = [line for line in arguments("COPY") if not line.startswith("--from=build")]
    assert copied == ["requirements.lock .", "app app"]
    assert arguments("ADD") == []


def test_the_build_context_contains_only_what_it_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules == ["*", "!app", "!requirements.lock", "**/__pycache__"]


def test_the_guide_shows_the_published_commands_first() -> None:
    section = (ROOT / "docs" / "kubernetes.md").read_text().partition("## Image\n")[2]
    first_block = section.split("```sh\n")[1].split("```")[0]
    assert first_block.splitlines() == [
        "docker build -t payment_service .",
        "docker run -p 8002:8002 --env-file .env payment_service",
    ]


def test_the_example_env_file_has_only_lines_that_docker_and_kubectl_accept() -> None:
    for line in (ROOT / ".env.example").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Z_]+=\S+", line), line


def test_the_dockerfile_needs_no_buildkit() -> None:
    assert not (ROOT / "Dockerfile").read_text().startswith("# syntax")
    for name, rest in instructions():
        assert "<<" not in rest  # a here-document
        options = re.findall(r"^--(\w+)", rest)
        assert options == [] or (name, *options) in {("COPY", "from"), ("HEALTHCHECK", "interval")}


def test_the_checkout_has_unix_line_endings() -> None:
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()


def test_the_final_stage_copies_the_build_and_installs_nothing() -> None:
    copied = [rest for name, rest in final_stage() if name == "COPY"]
    assert copied == ["--from=build /venv /venv", "--from=build /service /service"]
    assert "RUN" not in [name for name, _ in final_stage()]
    assert "python -m venv --without-pip /venv " in arguments("RUN")[0]
    assert "--only-binary :all: --require-hashes -r requirements.lock" in arguments("RUN")[0]


def test_the_labels_describe_the_build() -> None:
    given = [argument.split("=") for argument in arguments("ARG")]
    assert given == [["VERSION", "unknown"], ["REVISION", "unknown"], ["CREATED", "unknown"]]
    (labels,) = arguments("LABEL")
    for name, _ in given:
        assert f"org.opencontainers.image.{name.lower()}=${name}" in labels
    for name in ("title", "description"):
        assert f'org.opencontainers.image.{name}="' in labels


def test_another_user_can_run_the_service_without_writing_bytecode() -> None:
    assert arguments("RUN")[-1].split(" && ") == [
        "chmod -R a+rX app",
        "/venv/bin/python -m compileall -q app",
    ]
    assert "PYTHONDONTWRITEBYTECODE=1" in arguments("ENV")[0]


def test_the_user_is_a_number_and_not_root() -> None:
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_command_is_in_exec_form_and_serves_the_exposed_port() -> None:
    (command,) = arguments("CMD")
    # No host: the container accepts connections over IPv4 and IPv6.
    assert json.loads(command) == ["python", "-m", "app", "--port", arguments("EXPOSE")[0]]


def test_the_server_timeouts_fit_proxies_and_the_pod() -> None:
    config = make_config(create_app())
    assert config.timeout_graceful_shutdown == 20
    assert config.timeout_keep_alive > 60  # as long as proxies keep a connection
    assert (config.server_header, config.access_log, config.workers) == (False, False, 1)


def test_the_health_check_uses_the_exposed_port() -> None:
    program, option, code = health_check()
    assert (program, option) == ("python", "-c")
    assert f"'http://127.0.0.1:{arguments('EXPOSE')[0]}/health'" in code


def test_the_health_check_needs_only_python_and_no_proxy() -> None:
    with served(create_app(make_settings())) as url:
        assert check_health(url) == 0


def test_the_health_check_fails_on_an_error_response() -> None:
    with served(create_app(make_settings())) as url:
        assert check_health(f"{url}/no-such-route") != 0


def test_the_health_check_fails_if_nothing_listens() -> None:
    assert check_health(f"http://127.0.0.1:{free_port()}") != 0


def test_every_requirement_is_pinned() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.match(r"[A-Za-z0-9_.-]+==[0-9][^ ]*(  # .+)?$", line), line
