"""The production overlay, as rendered by kubectl."""

import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from programs import find_program
from servers import make_settings

from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAY = K8S / "overlays" / "production"
GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
DEVELOPMENT = {
    document["kind"]: document
    for document in yaml.safe_load_all((K8S / "deployment.yaml").read_text())
}


@pytest.fixture(scope="module")
def rendered() -> str:
    kubectl = find_program("kubectl")
    ended = subprocess.run(
        [kubectl, "kustomize", str(OVERLAY)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stderr == ""  # kubectl prints deprecation warnings there
    return ended.stdout


@pytest.fixture(scope="module")
def objects(rendered: str) -> dict[str, dict[str, Any]]:
    documents = list(yaml.safe_load_all(rendered))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def test_the_base_of_the_overlays_matches_the_manifests() -> None:
    copied = (K8S / "overlays" / "base" / "manifests.yaml").read_text()
    assert copied == (K8S / "deployment.yaml").read_text(), "make manifests"


@pytest.mark.parametrize("version", ["1.29", "1.35"])
def test_every_object_fits_the_schema(objects: dict[str, dict[str, Any]], version: str) -> None:
    assert set(objects) == {*DEVELOPMENT, "Ingress"}
    for document in objects.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_nothing_is_named_after_development(rendered: str) -> None:
    assert "-dev" not in rendered


def test_all_objects_are_in_the_production_namespace(objects: dict[str, dict[str, Any]]) -> None:
    assert objects.pop("Namespace")["metadata"]["name"] == "payment-service"
    for document in objects.values():
        assert document["metadata"]["namespace"] == "payment-service"
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "payment-service"


def test_the_image_is_pinned_to_a_digest(objects: dict[str, dict[str, Any]]) -> None:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert re.fullmatch(r"justingav/payment-service@sha256:[0-9a-f]{64}", container["image"])
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_there_are_more_pods_than_in_development(objects: dict[str, dict[str, Any]]) -> None:
    base = DEVELOPMENT["HorizontalPodAutoscaler"]["spec"]
    autoscaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert (autoscaler["minReplicas"], autoscaler["maxReplicas"]) == (3, 20)
    assert "three to twenty pods" in " ".join(GUIDE.split())
    for bound in ("minReplicas", "maxReplicas"):
        assert autoscaler[bound] > base[bound]
    assert autoscaler["behavior"] == base["behavior"]


def test_references_between_objects_resolve(
    objects: dict[str, dict[str, Any]],
) -> None:
    deployment = objects["Deployment"]
    pod = deployment["spec"]["template"]
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == deployment["metadata"]["name"]
    maps = [source["configMapRef"] for source in pod["spec"]["containers"][0]["envFrom"][1:]]
    assert maps == [{"name": objects["ConfigMap"]["metadata"]["name"]}]
    labels = pod["metadata"]["labels"].items()
    assert objects["Service"]["spec"]["selector"].items() <= labels
    for kind, selector in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert objects[kind]["spec"][selector]["matchLabels"].items() <= labels


def test_payments_need_a_token_and_the_service_accepts_the_configuration(
    objects: dict[str, dict[str, Any]],
) -> None:
    data = {name.lower(): value for name, value in objects["ConfigMap"]["data"].items()}
    assert set(data) <= set(Settings.model_fields) - {"supabase_url", "supabase_key"}
    settings = make_settings(**data)
    assert {name: getattr(settings, name) for name in data} == data
    for name in ("auth_jwks_url", "auth_issuer", "auth_audience", "auth_required_role"):
        assert data[name]


def test_the_products_service_is_found_from_another_namespace(
    objects: dict[str, dict[str, Any]],
) -> None:
    base = DEVELOPMENT["ConfigMap"]["data"]["PRODUCTS_SERVICE_URL"]
    address = httpx.URL(objects["ConfigMap"]["data"]["PRODUCTS_SERVICE_URL"])
    service, namespace, kind = address.host.split(".")
    assert (address.scheme, address.port) == ("http", httpx.URL(base).port)
    assert service == httpx.URL(base).host
    assert kind == "svc"
    assert namespace != objects["ConfigMap"]["metadata"]["namespace"]
    assert f"products service's namespace (`{namespace}`" in GUIDE


def test_the_ingress_terminates_tls_and_routes_to_the_service(
    objects: dict[str, dict[str, Any]],
) -> None:
    ingress = objects["Ingress"]["spec"]
    service = objects["Service"]
    (rule,) = ingress["rules"]
    (tls,) = ingress["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert f"secret tls {tls['secretName']} --cert" in GUIDE
    (port,) = service["spec"]["ports"]
    backend = {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    assert all(path["backend"] == {"service": backend} for path in rule["http"]["paths"])


def test_the_ingress_accepts_no_plain_http(objects: dict[str, dict[str, Any]]) -> None:
    ingress = objects["Ingress"]
    # Of Traefik's two usual entry points, web is plain HTTP.
    traefik = "traefik.ingress.kubernetes.io/router"
    assert ingress["metadata"]["annotations"] == {
        f"{traefik}.entrypoints": "websecure",
        f"{traefik}.tls": "true",
    }
    assert ingress["spec"]["ingressClassName"] == "traefik"


def test_the_ingress_exposes_only_the_routes_for_callers(
    objects: dict[str, dict[str, Any]],
) -> None:
    (rule,) = objects["Ingress"]["spec"]["rules"]
    opened = {path["path"]: path["pathType"] for path in rule["http"]["paths"]}

    def is_open(path: str) -> bool:
        return opened.get(path) is not None or any(
            path.startswith(f"{prefix}/") for prefix, kind in opened.items() if kind == "Prefix"
        )

    app = create_app()
    paths = {*app.openapi()["paths"], *(getattr(route, "path", "") for route in app.routes)}
    assert {path for path in paths if not is_open(path)} == {"/health", "/ready", "/metrics"}
    for prefix in opened:
        assert any(path == prefix or path.startswith(f"{prefix}/") for path in paths)


def test_the_ingress_controller_reaches_the_pods(objects: dict[str, dict[str, Any]]) -> None:
    (rule,) = objects["NetworkPolicy"]["spec"]["ingress"]
    peers = [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"]]
    controller = {"kubernetes.io/metadata.name": objects["Ingress"]["spec"]["ingressClassName"]}
    assert controller in peers
    assert {"payments-caller": "true"} in peers
