"""The manifests against checkov's policies, and who reaches whom under the NetworkPolicies."""

import json
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
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


def test_the_development_manifests_violate_only_the_listed_policies() -> None:
    report = check(ROOT / "k8s")
    assert failed(report) == EVERYWHERE | IN_DEVELOPMENT
    assert report["summary"]["passed"] > 80


def test_the_production_overlay_violates_only_the_listed_policies(tmp_path: Path) -> None:
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
def test_an_unsafe_pod_is_detected(tmp_path: Path, safe: str, unsafe: str, broken: str) -> None:
    text = (ROOT / "k8s" / "deployment.yaml").read_text()
    assert text.count(safe) == 1
    changed = tmp_path / "deployment.yaml"
    changed.write_text(text.replace(safe, unsafe))
    assert broken in failed(check(changed))


class Place(NamedTuple):
    """A pod with the labels of its namespace and of its own, or an address outside."""

    address: str = ""
    namespace: str = ""
    name: str = ""
    is_caller: bool = False

    @property
    def namespace_labels(self) -> dict[str, str]:
        labels = {"kubernetes.io/metadata.name": self.namespace}
        return labels | ({"payments-caller": "true"} if self.is_caller else {})

    @property
    def pod_labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": self.name}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def is_peer(peer: dict[str, Any], place: Place) -> bool:
    """Tell whether a peer of a rule is the place; both selectors of a peer have to fit."""
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if not place.address or place.namespace:
            return False
        address = ip_address(place.address)
        excepted = any(address in ip_network(one) for one in block.get("except", ()))
        return address in ip_network(block["cidr"]) and not excepted
    assert "namespaceSelector" in peer
    return (
        bool(place.namespace)
        and matches(peer["namespaceSelector"], place.namespace_labels)
        and matches(peer.get("podSelector", {}), place.pod_labels)
    )


def is_allowed(rules: list[dict[str, Any]], side: str, place: Place, port: int | str) -> bool:
    return any(
        any(is_peer(peer, place) for peer in rule[side])
        and port in [one["port"] for one in rule["ports"]]
        for rule in rules
    )


def policy(overlay: str) -> dict[str, Any]:
    command = [find_program("kubectl"), "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = [one for one in yaml.safe_load_all(rendered) if one["kind"] == "NetworkPolicy"]
    spec: dict[str, Any] = found["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}  # what no rule allows is refused
    assert all(rule["from"] for rule in spec["ingress"])
    assert all(rule["to"] for rule in spec["egress"])
    return spec


PROMETHEUS = Place(namespace="monitoring", name="prometheus")
TRAEFIK = Place(namespace="traefik", name="traefik")
SENDERS = {
    "a namespace of callers": (Place(namespace="kiosks", is_caller=True), {"base", "production"}),
    "Prometheus": (PROMETHEUS, {"base", "production"}),
    "Grafana": (Place(namespace="monitoring", name="grafana"), set()),
    "a pod called Prometheus elsewhere": (Place(namespace="x", name="prometheus"), set()),
    "the Ingress controller": (TRAEFIK, {"production"}),
    "another pod beside it": (Place(namespace="traefik", name="x"), set()),
    "any pod": (Place(namespace="default", name="x"), set()),
    "the internet": (Place("203.0.113.9"), set()),
}
PRODUCTS = Place(namespace="products", name="products-service")
COLLECTOR = Place(namespace="monitoring", name="opentelemetry-collector")
DESTINATIONS = {
    "name server": (Place(namespace="kube-system", name="x"), 53, {"base", "production"}),
    "products service": (PRODUCTS, 8001, {"base", "production"}),
    "products service's database": (PRODUCTS, 5432, set()),
    "a products service elsewhere": (PRODUCTS._replace(namespace="x"), 8001, {"base"}),
    "collector": (COLLECTOR, 4318, {"base", "production"}),
    "Grafana": (COLLECTOR._replace(name="grafana"), 4318, set()),
    "Supabase, put in": (Place("192.0.2.7"), 443, {"base", "production"}),
    "the issuer, put in": (Place("198.51.100.7"), 443, {"base", "production"}),
    "any host": (Place("203.0.113.9"), 443, {"base"}),
    "any host, IPv6": (Place("2001:db8::1"), 443, {"base"}),
    "any host in clear": (Place("203.0.113.9"), 80, set()),
    "the API server's Service": (Place("10.96.0.1"), 443, set()),
    "the API server of a managed cluster": (Place("172.16.0.2"), 443, set()),
    "an API server behind carrier-grade NAT": (Place("100.64.0.1"), 443, set()),
    "the API server, IPv6": (Place("fd00::1"), 443, set()),
    "the API server's own port": (Place("10.0.0.1"), 6443, set()),
    "a kubelet": (Place("192.168.0.10"), 10250, set()),
    "a cloud's metadata": (Place("169.254.169.254"), 80, set()),
    "a database": (Place("203.0.113.9"), 5432, set()),
    "any pod": (Place(namespace="default", name="x"), 443, set()),
}


@pytest.mark.parametrize("overlay", ["base", "production"])
@pytest.mark.parametrize(("sender", "where"), SENDERS.values(), ids=SENDERS)
def test_only_callers_prometheus_and_the_ingress_reach_the_pods(
    overlay: str, sender: Place, where: set[str]
) -> None:
    rules = policy(overlay)["ingress"]
    assert is_allowed(rules, "from", sender, "http") is (overlay in where)
    assert not is_allowed(rules, "from", sender, 22)


@pytest.mark.parametrize("overlay", ["base", "production"])
@pytest.mark.parametrize(("place", "port", "where"), DESTINATIONS.values(), ids=DESTINATIONS)
def test_the_pods_reach_what_they_need_and_never_the_api_server(
    overlay: str, place: Place, port: int, where: set[str]
) -> None:
    assert is_allowed(policy(overlay)["egress"], "to", place, port) is (overlay in where)


def test_in_production_every_destination_has_a_name_or_a_narrow_address() -> None:
    for rule in policy("production")["egress"]:
        for peer in rule["to"]:
            if "ipBlock" in peer:
                assert ip_network(peer["ipBlock"]["cidr"]).prefixlen >= 16
            else:
                assert peer["namespaceSelector"]["matchLabels"]
