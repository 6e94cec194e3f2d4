"""The manifests match the Kubernetes schemas, each other, the image and the code."""

import json
import re
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from servers import make_settings

from app.main import create_app
from app.server.server import GRACEFUL_SHUTDOWN_SECONDS_MAX
from app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
READ_BY_KUBECTL = {".json", ".yaml", ".yml"}
MANIFEST = ROOT / "k8s" / "deployment.yaml"
NAMESPACE = "payment-service-dev"
KUBERNETES_VERSIONS = ["1.29", "1.35"]
# Strings that look like keys: digests, URL paths, names of metrics.
NO_KEY = re.compile(r"sha256:[0-9a-f]{64}|path: /\S+|\bpayment_[a-z_]+\b")
# Supabase's keys, JSON web tokens, private keys, passwords in URLs, long random strings.
LIKE_A_KEY = re.compile(r"sb_secret_|sbp_|eyJ|PRIVATE KEY|://[^/\s]*@|[A-Za-z0-9+/_=]{40}")


DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
KINDS = [document["kind"] for document in DOCUMENTS]
OBJECTS = dict(zip(KINDS, DOCUMENTS, strict=True))
CONTAINER = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"][0]
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_object_fits_the_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(OBJECTS[kind], version, strict=True)


def test_one_file_has_one_object_of_each_kind_and_no_other_file_is_applied() -> None:
    kinds = ["Namespace", "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Service"]
    assert [*kinds, "NetworkPolicy", "PodDisruptionBudget"] == KINDS
    applied = [path for path in (ROOT / "k8s").iterdir() if path.suffix in READ_BY_KUBECTL]
    assert applied == [MANIFEST]


def find_ports(part: object) -> list[dict[str, Any]]:
    """Return the elements of every list named ports, at any depth."""
    if isinstance(part, list):
        return [port for element in part for port in find_ports(element)]
    if not isinstance(part, dict):
        return []
    nested = [port for value in part.values() for port in find_ports(value)]
    return [*part.get("ports", ()), *nested]


@pytest.mark.parametrize("path", sorted((ROOT / "k8s").rglob("*.yaml")), ids=str)
def test_every_port_names_its_protocol(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        for port in find_ports(document):
            # The API server adds TCP, so that a list without it always differs on the server.
            assert port.get("protocol") in ("TCP", "UDP"), port


def test_the_ports_of_every_object_are_found() -> None:
    counts = {kind: len(find_ports(document)) for kind, document in OBJECTS.items()}
    assert {kind for kind, count in counts.items() if count} == {
        "Deployment",
        "Service",
        "NetworkPolicy",
    }
    assert counts["NetworkPolicy"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_is_found_by_the_recommended_labels(kind: str) -> None:
    labels = OBJECTS[kind]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == "payment-service"
    assert labels["app.kubernetes.io/instance"] == NAMESPACE


def test_the_namespace_is_applied_before_its_objects() -> None:
    namespace, *others = DOCUMENTS
    assert namespace["kind"] == "Namespace"
    assert namespace["metadata"]["name"] == NAMESPACE
    for document in others:
        assert document["metadata"]["namespace"] == NAMESPACE


def test_the_names_match_the_guide() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    assert OBJECTS["Deployment"]["metadata"]["name"] == "payment-service-dev"
    assert OBJECTS["HorizontalPodAutoscaler"]["metadata"]["name"] == "payment-service-dev-hpa"
    assert CONTAINER["image"] == "justingav/payment-service:latest"
    (secret,) = [source["secretRef"] for source in CONTAINER["envFrom"] if "secretRef" in source]
    for name in ("deployment/payment-service-dev", "payment-service-dev-hpa", secret["name"]):
        assert name in guide


def test_the_autoscaler_targets_the_deployment_and_owns_its_size() -> None:
    target = OBJECTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = OBJECTS["Deployment"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]


def test_the_autoscaler_scales_by_the_requested_cpu() -> None:
    autoscaler = OBJECTS["HorizontalPodAutoscaler"]["spec"]
    (metric,) = autoscaler["metrics"]
    assert (autoscaler["minReplicas"], autoscaler["maxReplicas"]) == (2, 10)
    # Low enough that new pods are ready before the existing pods are saturated.
    assert metric["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert metric["resource"]["name"] == "cpu"
    assert CONTAINER["resources"]["requests"]["cpu"]


def test_the_autoscaler_scales_up_immediately_and_down_slowly() -> None:
    behavior = OBJECTS["HorizontalPodAutoscaler"]["spec"]["behavior"]
    twice_as_many = {"type": "Percent", "value": 100, "periodSeconds": 15}
    one_less = {"type": "Pods", "value": 1, "periodSeconds": 60}
    assert behavior == {
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [twice_as_many]},
        "scaleDown": {"stabilizationWindowSeconds": 300, "policies": [one_less]},
    }


def test_the_resources_of_the_pod_match_the_runbook() -> None:
    assert CONTAINER["resources"] == {
        "requests": {"cpu": "250m", "memory": "128Mi"},
        "limits": {"memory": "256Mi"},
    }
    runbook = " ".join((ROOT / "docs" / "operations.md").read_text().split())
    assert "requests 250m of a processor and 128 MiB, is killed above 256 MiB" in runbook


def test_the_namespace_enforces_the_restricted_pod_security_standard() -> None:
    labels = OBJECTS["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_service_finds_the_pods_on_the_port_of_the_image() -> None:
    service = OBJECTS["Service"]["spec"]
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (port,) = CONTAINER["ports"]
    assert service["selector"] == OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"]
    assert service["selector"].items() <= labels.items()
    (served,) = service["ports"]
    assert served["name"] == served["targetPort"] == port["name"] == "http"
    assert served["port"] == port["containerPort"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"\nEXPOSE {port['containerPort']}\n" in dockerfile
    assert f'"--port", "{port["containerPort"]}"' in dockerfile


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")],
)
def test_probes_use_existing_routes(probe: str, path: str) -> None:
    assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}
    assert "get" in create_app().openapi()["paths"][path]


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_a_pod_is_restarted_after_thirty_seconds_without_a_response(probe: str) -> None:
    settings = CONTAINER[probe]
    assert settings["periodSeconds"] * settings["failureThreshold"] == 30


def test_a_pod_under_load_has_time_to_respond() -> None:
    assert CONTAINER["livenessProbe"]["timeoutSeconds"] >= 2
    assert CONTAINER["readinessProbe"]["timeoutSeconds"] >= 2


def test_a_pod_gets_debits_soon_after_it_is_ready() -> None:
    assert CONTAINER["startupProbe"]["periodSeconds"] == 1
    assert CONTAINER["readinessProbe"]["periodSeconds"] <= 5


def test_the_service_accepts_the_configuration() -> None:
    data = {name.lower(): value for name, value in OBJECTS["ConfigMap"]["data"].items()}
    assert set(data) <= set(Settings.model_fields) - {"supabase_url", "supabase_key"}
    settings = make_settings(**data)
    assert {name: getattr(settings, name) for name in data} == data


def test_the_config_map_overrides_the_secret() -> None:
    names = [source[kind]["name"] for source in CONTAINER["envFrom"] for kind in source]
    assert names == ["payment-service-secrets", OBJECTS["ConfigMap"]["metadata"]["name"]]
    assert "env" not in CONTAINER


def test_the_grace_period_is_longer_than_the_graceful_shutdown() -> None:
    waiting = re.search(r"sleep\((\d+)\)", json.dumps(CONTAINER["lifecycle"]))
    assert waiting is not None
    assert (
        int(waiting[1]) + GRACEFUL_SHUTDOWN_SECONDS_MAX < POD["terminationGracePeriodSeconds"] <= 30
    )


def test_the_pre_stop_command_runs_in_the_image() -> None:
    program, *arguments = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert f'CMD ["{program}", "-c"' in (ROOT / "Dockerfile").read_text()  # its health check
    at_once = [re.sub(r"sleep\(\d+\)", "sleep(0)", argument) for argument in arguments]
    subprocess.run([sys.executable, *at_once], check=True, timeout=60)


def test_the_pod_runs_with_minimal_privileges() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["enableServiceLinks"] is False  # variables of other services are not settings
    user = POD["securityContext"]["runAsUser"]
    assert POD["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text()
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_manifests_contain_no_secret() -> None:
    for path in (ROOT / "k8s").rglob("*.*"):
        text = NO_KEY.sub("", path.read_text())
        assert LIKE_A_KEY.search(text) is None, path
        assert "kind: Secret" not in text


def test_a_rolling_update_never_has_fewer_pods_than_before() -> None:
    assert OBJECTS["Deployment"]["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},  # with 0 and 0 the API refuses it
    }


def test_a_pod_must_stay_ready_for_ten_seconds_before_the_rollout_continues() -> None:
    assert OBJECTS["Deployment"]["spec"]["minReadySeconds"] == 10


def test_pods_are_spread_over_nodes_and_zones() -> None:
    labels = OBJECTS["Deployment"]["spec"]["selector"]
    spread = POD["topologySpreadConstraints"]
    assert [constraint["topologyKey"] for constraint in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    for constraint in spread:
        assert constraint["labelSelector"] == labels
        assert constraint["maxSkew"] == 1
        # A cluster with a single node must run all pods.
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"


def test_a_node_can_be_drained_one_pod_at_a_time() -> None:
    budget = OBJECTS["PodDisruptionBudget"]["spec"]
    assert budget["selector"] == OBJECTS["Deployment"]["spec"]["selector"]
    assert budget["maxUnavailable"] == 1
    assert (
        budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    )  # otherwise, an unready pod blocks the drain
    assert OBJECTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > budget["maxUnavailable"]


def test_only_labelled_namespaces_and_prometheus_reach_the_pods() -> None:
    policy = OBJECTS["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == OBJECTS["Deployment"]["spec"]["selector"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"]] == [
        {"payments-caller": "true"},
        {"kubernetes.io/metadata.name": "monitoring"},
    ]
    assert "payments-caller=true" in (ROOT / "docs" / "kubernetes.md").read_text()


def test_egress_is_limited_to_dns_products_https_and_the_collector() -> None:
    ports = [[port["port"] for port in rule["ports"]] for rule in egress()]
    assert ports == [[53, 53], [8001], [443], [4318]]
    assert all(rule["to"] for rule in egress())  # a rule without `to` allows every destination
    products = OBJECTS["ConfigMap"]["data"]["PRODUCTS_SERVICE_URL"]
    assert products.endswith(":8001")
    (products_pods,) = egress()[1]["to"]
    (name,) = products_pods["podSelector"]["matchLabels"].values()
    assert products == f"http://{name}:8001"


def test_dns_egress_covers_cluster_and_node_local_name_servers() -> None:
    names = egress()[0]
    assert names["ports"] == [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert names["to"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
        {"ipBlock": {"cidr": "169.254.169.254/32"}},  # also the name server on Google Cloud
    ]


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254", "fe80::1"])
def test_the_cloud_metadata_service_is_unreachable(address: str) -> None:
    destination = ip_address(address)
    rules = [rule for rule in egress() if {port["port"] for port in rule["ports"]} != {53}]
    assert len(rules) == len(egress()) - 1
    for block in (peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer):
        excepted = any(destination in ip_network(network) for network in block.get("except", ()))
        assert excepted or destination not in ip_network(block["cidr"])


def egress() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = OBJECTS["NetworkPolicy"]["spec"]["egress"]
    return rules


@pytest.mark.parametrize(
    "text", ["sb_secret_abc", "eyJhbGciOi.eyJyb2xl", "postgres://postgres:word@db/x", "0aB1" * 10]
)
def test_a_key_is_detected(text: str) -> None:
    assert LIKE_A_KEY.search(text)
