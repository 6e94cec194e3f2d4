"""The manifests fit the Kubernetes schemas, each other, the image and the code."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.main import PaymentService
from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "k8s").glob("*.yaml"))
NAMESPACE = "payment-service-dev"
KUBERNETES_VERSIONS = ["1.29", "1.35"]


def load(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())  # one object a file
    assert isinstance(document, dict)
    return document


OBJECTS = {document["kind"]: document for document in map(load, FILES)}
CONTAINER = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"][0]
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_manifest_fits_the_schema(path: Path, version: str) -> None:
    kubernetes_validate.validate(load(path), version, strict=True)


def test_there_is_one_object_of_each_kind() -> None:
    kinds = {"Namespace", "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Service"}
    assert set(OBJECTS) == kinds
    assert len(FILES) == len(kinds)


def test_the_namespace_is_applied_before_what_lives_in_it() -> None:
    assert load(FILES[0])["kind"] == "Namespace"
    assert load(FILES[0])["metadata"]["name"] == NAMESPACE
    for path in FILES[1:]:
        assert load(path)["metadata"]["namespace"] == NAMESPACE


def test_the_names_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert OBJECTS["Deployment"]["metadata"]["name"] == "payment-service-dev"
    assert OBJECTS["HorizontalPodAutoscaler"]["metadata"]["name"] == "payment-service-dev-hpa"
    assert CONTAINER["image"] == "justingav/payment-service:latest"
    secret = CONTAINER["envFrom"][0]["secretRef"]["name"]
    for name in ("deployment/payment-service-dev", "payment-service-dev-hpa", secret):
        assert name in readme


def test_the_autoscaler_targets_the_deployment_and_owns_its_size() -> None:
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = OBJECTS["Deployment"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert CONTAINER["resources"]["requests"]["cpu"]


def test_the_service_finds_the_pods_on_the_port_of_the_image() -> None:
    service = OBJECTS["Service"]["spec"]
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (port,) = CONTAINER["ports"]
    assert service["selector"] == OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert service["ports"] == [
        {"name": "http", "port": port["containerPort"], "targetPort": port["name"]}
    ]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {port['containerPort']}" in dockerfile
    assert f'"--port", "{port["containerPort"]}"' in dockerfile


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")],
)
def test_probes_ask_routes_that_exist(probe: str, path: str) -> None:
    assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}
    assert "get" in PaymentService().openapi()["paths"][path]


def test_the_configuration_knows_only_settings_of_the_service() -> None:
    settings = {name.upper() for name in Settings.model_fields}
    assert set(OBJECTS["ConfigMap"]["data"]) <= settings


def test_the_pod_gets_more_time_than_the_graceful_stop_takes() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stop = re.search(r'"--timeout-graceful-shutdown", "(\d+)"', dockerfile)
    waiting = re.search(r"sleep\((\d+)\)", json.dumps(CONTAINER["lifecycle"]))
    assert stop is not None
    assert waiting is not None
    assert int(waiting[1]) + int(stop[1]) < POD["terminationGracePeriodSeconds"]


def test_the_pod_has_no_rights_that_it_does_not_need() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_no_secret_is_in_the_folder() -> None:
    for path in FILES:
        assert "eyJ" not in path.read_text()
        assert load(path)["kind"] != "Secret"
