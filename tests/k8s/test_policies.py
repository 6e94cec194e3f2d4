"""The manifests against checkov's policies, every exception with its reason."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import find_program, unavailable

ROOT = Path(__file__).parent.parent.parent
CHECKOV = ROOT / ".venv-checkov" / "bin" / "checkov"

EVERYWHERE = {
    # Throttling would slow debits when the crowd comes; the autoscaler adds pods instead.
    "CKV_K8S_11": "CPU limits should be set",
    # The service reads its environment only; a file would be as readable to whoever is inside.
    "CKV_K8S_35": "Prefer using secrets as files over secrets as environment variables",
}
IN_DEVELOPMENT = {
    # Where developers push all day, the newest is wanted; production names a digest.
    "CKV_K8S_14": "Image Tag should be fixed - not latest or blank",
    "CKV_K8S_43": "Image should use digest",
}


def check(path: Path) -> dict[str, Any]:
    """Run checkov on the manifests of a file, or of a folder without those below it."""
    if not CHECKOV.exists():
        unavailable("needs checkov: make policies")
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    named = [argument for file in files for argument in ("--file", str(file))]
    ended = subprocess.run(
        [str(CHECKOV), "--framework", "kubernetes", "--skip-download", "--output=json", *named],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["summary"]["parsing_errors"] == 0
    return report


def failed(report: dict[str, Any]) -> dict[str, str]:
    return {one["check_id"]: one["check_name"] for one in report["results"]["failed_checks"]}


def test_the_manifests_for_development_break_no_other_policy() -> None:
    report = check(ROOT / "k8s")
    assert failed(report) == EVERYWHERE | IN_DEVELOPMENT
    assert report["summary"]["passed"] > 80


def test_the_overlay_for_production_breaks_no_other_policy(tmp_path: Path) -> None:
    overlay = str(ROOT / "k8s" / "overlays" / "production")
    rendered = tmp_path / "production.yaml"
    with rendered.open("w") as file:
        subprocess.run([find_program("kubectl"), "kustomize", overlay], stdout=file, check=True)
    report = check(rendered)
    assert failed(report) == EVERYWHERE
    assert report["summary"]["passed"] > 80


@pytest.mark.parametrize(
    ("safe", "unsafe", "broken"),
    [
        ("allowPrivilegeEscalation: false", "privileged: true", "CKV_K8S_16"),
        ("runAsUser: 10001", "runAsUser: 0", "CKV_K8S_40"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "CKV_K8S_22"),
    ],
)
def test_an_unsafe_pod_would_be_seen(tmp_path: Path, safe: str, unsafe: str, broken: str) -> None:
    text = (ROOT / "k8s" / "deployment.yaml").read_text()
    assert text.count(safe) == 1
    changed = tmp_path / "deployment.yaml"
    changed.write_text(text.replace(safe, unsafe))
    assert broken in failed(check(changed))
