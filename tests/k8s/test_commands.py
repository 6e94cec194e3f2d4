"""The kubectl commands of docs/kubernetes.md and the runbook, run with the real kubectl."""

import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from api_server import ApiServer
from documents import blocks_of, code_in
from programs import find_program
from servers import await_true

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
NAMESPACE = "payment-service-dev"
MARK = "<!-- run by tests/k8s/test_commands.py -->"
SECOND = timedelta(seconds=1)
CREATE = "kubectl create secret generic payment-service-secrets "

Run = Callable[..., subprocess.CompletedProcess[str]]


def commands(document: str) -> list[str]:
    """Return the commands in the code blocks of a document, without comments."""
    return split_commands(code_in(document, "sh"))


def split_commands(blocks: Iterable[str]) -> list[str]:
    lines = re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines()
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def marked_commands(document: str, section: str) -> list[str]:
    """Return the commands of a section's code blocks that the document marks as run here."""
    text = document.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return split_commands(block.text for block in blocks_of(text) if block.line_above == MARK)


CREATE_SECRET = next(command for command in commands(GUIDE) if command.startswith(CREATE))
WRITE_SECRET = CREATE_SECRET.partition(" | ")[0]


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as api:
        yield api


@pytest.fixture
def run(api: ApiServer, tmp_path: Path) -> Run:
    """Return a function that runs commands in a copy of k8s/ on the test's API server."""
    kubectl = find_program("kubectl")
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    write_env(tmp_path, SUPABASE_URL="https://abc.supabase.co", SUPABASE_KEY='"quoted"')
    wrapper = tmp_path / "bin" / "kubectl"
    wrapper.parent.mkdir()
    # The API server of the test has no OpenAPI document for validation.
    wrapper.write_text(
        '#!/bin/sh\ncase "$1" in apply | replace) set -- "$@" --validate=false ;; esac\n'
        f'exec {kubectl} "$@"\n'
    )
    wrapper.chmod(0o755)
    (tmp_path / "kubeconfig").write_text(json.dumps(api.kubeconfig()))
    environment = os.environ | {
        "PATH": f"{wrapper.parent}:{os.environ['PATH']}",
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "KUBECACHEDIR": str(tmp_path / "cache"),
    }

    def run(command: str, folder: str = "k8s") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tmp_path / folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def write_env(folder: Path, **variables: str) -> None:
    lines = [f"{name}={value}\n" for name, value in variables.items()]
    (folder / ".env").write_text("".join(lines))


def succeed(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def read_secret(api: ApiServer) -> dict[str, str]:
    secret = api.find("Secret")
    assert secret is not None
    return {name: b64decode(value).decode() for name, value in secret["data"].items()}


@pytest.mark.parametrize("command", ["kubectl apply -f deployment.yaml", "kubectl apply -f ."])
def test_one_command_creates_all_objects_on_an_empty_cluster(
    api: ApiServer, run: Run, command: str
) -> None:
    output = succeed(run(command)).splitlines()
    assert len(output) == len(api.objects) == 7
    assert all(line.endswith(" created") for line in output)


def test_a_repeated_apply_changes_only_what_kubectl_always_sends(api: ApiServer, run: Run) -> None:
    succeed(run("kubectl apply -f deployment.yaml"))
    api.calls.clear()
    output = succeed(run("kubectl apply -f deployment.yaml")).splitlines()
    configured = [line for line in output if not line.endswith(" unchanged")]
    assert configured == ["poddisruptionbudget.policy/payment-service-dev configured"]
    assert len(api.calls) == 1


@pytest.mark.parametrize(
    ("default", "kind"),
    [("\n          protocol: TCP", "networkpolicy"), ("\n    type: RollingUpdate", "deployment")],
)
def test_an_omitted_default_is_detected(run: Run, tmp_path: Path, default: str, kind: str) -> None:
    manifest = tmp_path / "k8s" / "deployment.yaml"
    assert default in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(default, ""))
    succeed(run("kubectl apply -f deployment.yaml"))
    output = succeed(run("kubectl apply -f deployment.yaml"))
    assert re.search(rf"^{kind}\S+ configured$", output, re.MULTILINE)


def test_delete_and_apply_recreate_everything_except_the_secret(api: ApiServer, run: Run) -> None:
    command = "kubectl delete -f deployment.yaml && kubectl apply -f deployment.yaml"
    assert command in commands(GUIDE)
    succeed(run("kubectl apply -f deployment.yaml"))
    succeed(run(CREATE_SECRET))
    succeed(run(command))
    assert len(api.objects) == 7
    assert api.find("Secret") is None
    succeed(run(CREATE_SECRET))
    assert len(api.objects) == 8


@pytest.mark.parametrize(
    ("document", "section", "folder", "pods"),
    [(GUIDE, "Development", "k8s", 2), (GUIDE, "Production", ".", 3)],
    ids=["development", "production"],
)
def test_the_commands_of_the_guide_roll_out_all_pods(
    api: ApiServer, run: Run, document: str, section: str, folder: str, pods: int
) -> None:
    listed = marked_commands(document, section)
    deploying = [command for command in listed if "delete" not in command]
    assert len(deploying) == 4
    for command in deploying:
        output = succeed(run(command, folder))
    assert "successfully rolled out" in output
    deployment = api.find("Deployment")
    assert deployment is not None
    assert deployment["spec"]["replicas"] == pods
    assert read_secret(api)["SUPABASE_URL"] == "https://abc.supabase.co"


def test_the_runbook_deploys_and_restarts_the_pods(api: ApiServer, run: Run) -> None:
    listed = marked_commands(RUNBOOK, "Deploying and rolling back")
    assert len(listed) == 4
    for command in listed:
        succeed(run(command, "."))
    assert restarted_at(api)


def test_the_runbook_changes_the_secret_restarts_the_pods_and_puts_the_old_secret_back(
    api: ApiServer, run: Run, tmp_path: Path
) -> None:
    succeed(run("kubectl apply -k overlays/production"))
    succeed(run(CREATE_SECRET.replace(NAMESPACE, "payment-service")))
    env = tmp_path / ".env"
    env.unlink()  # as in a fresh clone
    write_env_of_secret, keep, *replace_secret, put_back, remove = marked_commands(
        RUNBOOK, "Changing the secret"
    )
    assert len(replace_secret) == 3
    succeed(run(write_env_of_secret, "."))
    succeed(run(keep, "."))
    for file in (env, tmp_path / ".env.old"):
        assert file.stat().st_mode & 0o077 == 0
    env.write_text(env.read_text().replace('"quoted"', '"new"'))
    for command in replace_secret:
        output = succeed(run(command, "."))
    assert "successfully rolled out" in output
    assert read_secret(api) == {
        "SUPABASE_URL": "https://abc.supabase.co",
        "SUPABASE_KEY": '"new"',
    }
    first_restart = restarted_at(api)
    assert first_restart

    # kubectl refuses a second restart in the same second.
    await_true(lambda: datetime.now(UTC) >= datetime.fromisoformat(first_restart) + SECOND)
    for command in (put_back, *replace_secret):
        succeed(run(command, "."))
    assert read_secret(api)["SUPABASE_KEY"] == '"quoted"'
    succeed(run(remove, "."))
    assert not list(tmp_path.glob(".env*"))


def restarted_at(api: ApiServer) -> str | None:
    """Return the time of the last restart, or None."""
    deployment = api.find("Deployment")
    assert deployment is not None
    annotations = deployment["spec"]["template"]["metadata"].get("annotations", {})
    at: str | None = annotations.get("kubectl.kubernetes.io/restartedAt")
    return at


@pytest.mark.parametrize("document", [GUIDE, RUNBOOK], ids=["guide", "runbook"])
def test_the_commands_wait_for_the_autoscaler_before_the_rollout(document: str) -> None:
    listed = commands(document)
    applied = [n for n, line in enumerate(listed) if re.search("apply -[fk] .*(dep|prod)", line)]
    assert applied
    for n in applied:
        if "delete" in listed[n]:
            continue
        wait, status = [
            line for line in listed[n:] if " wait " in line or "rollout status" in line
        ][:2]
        assert " wait --for=condition=AbleToScale hpa/payment-service" in wait
        assert " rollout status deployment/payment-service" in status


@pytest.mark.parametrize("before", ["nothing", "create", "apply", "the same command"])
def test_the_secret_matches_the_env_file_after_any_earlier_command(
    api: ApiServer, run: Run, tmp_path: Path, before: str
) -> None:
    earlier = {
        "nothing": "true",
        "create": f"{WRITE_SECRET} | kubectl create --validate=false -f -",
        "apply": f"{WRITE_SECRET} | kubectl apply -f -",
        "the same command": CREATE_SECRET,
    }
    write_env(tmp_path, SUPABASE_KEY="old", AUTH_JWKS_URL="https://login.example.org/certs")
    succeed(run(earlier[before]))
    write_env(tmp_path, SUPABASE_KEY='"new"')
    succeed(run(CREATE_SECRET))
    assert read_secret(api) == {"SUPABASE_KEY": '"new"'}


def test_the_secret_can_be_created_from_the_example_env_file(
    api: ApiServer, run: Run, tmp_path: Path
) -> None:
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    succeed(run(CREATE_SECRET))
    names = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(read_secret(api)) == sorted(names)


def test_a_missing_env_file_leaves_the_secret_unchanged(
    api: ApiServer, run: Run, tmp_path: Path
) -> None:
    succeed(run(CREATE_SECRET))
    (tmp_path / ".env").unlink()
    ended = run(CREATE_SECRET)
    assert ended.returncode != 0
    assert "no such file" in ended.stderr
    assert read_secret(api)["SUPABASE_URL"] == "https://abc.supabase.co"


def test_kubectl_apply_keeps_a_removed_variable(api: ApiServer, run: Run, tmp_path: Path) -> None:
    succeed(run(f"{WRITE_SECRET} | kubectl create --validate=false -f -"))
    write_env(tmp_path, SUPABASE_URL="https://abc.supabase.co")
    succeed(run(f"{WRITE_SECRET} | kubectl apply -f -"))
    assert "SUPABASE_KEY" in read_secret(api)


def test_the_secret_is_created_by_the_same_command_everywhere() -> None:
    found = [
        command
        for document in (GUIDE, RUNBOOK)
        for command in commands(document)
        if command.startswith(CREATE)
    ]
    assert len(found) == 3
    assert f"--namespace {NAMESPACE} " in found[0]
    in_production = {
        command.replace(f"{NAMESPACE} ", "payment-service ").replace("../.env", ".env")
        for command in found
    }
    assert len(in_production) == 1
    assert "create secret generic" not in GUIDE.replace(CREATE, "")


def test_the_monitoring_namespace_is_created_before_its_objects() -> None:
    for text in (GUIDE, RUNBOOK):
        listed = commands(text)
        creation = listed.index("kubectl create namespace monitoring")
        assert listed[creation + 1] == "kubectl apply -f k8s/monitoring/"
