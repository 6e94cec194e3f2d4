"""A small Kubernetes API server on loopback that stores the objects of kubectl with defaults."""

import json
from copy import deepcopy
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import urlsplit

# The kinds of the manifests, with their API versions and resource names.
KINDS = {
    "Namespace": ("v1", "namespaces"),
    "ConfigMap": ("v1", "configmaps"),
    "Secret": ("v1", "secrets"),
    "Service": ("v1", "services"),
    "Deployment": ("apps/v1", "deployments"),
    "HorizontalPodAutoscaler": ("autoscaling/v2", "horizontalpodautoscalers"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "Ingress": ("networking.k8s.io/v1", "ingresses"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
}
SERVICE_DEFAULTS = {"type": "ClusterIP", "sessionAffinity": "None", "clusterIP": "10.96.0.7"}
DEPLOYMENT_DEFAULTS = {"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600}
POD_DEFAULTS = {
    "dnsPolicy": "ClusterFirst",
    "restartPolicy": "Always",
    "schedulerName": "default-scheduler",
}
CONTAINER_DEFAULTS = {
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
}
SHORT_NAMES = {"HorizontalPodAutoscaler": ["hpa"]}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


NOT_FOUND = (
    HTTPStatus.NOT_FOUND,
    {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404},
)


def merge(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396): null removes a member, a list replaces a list."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif not name.startswith("$"):
            merged[name] = merge(merged.get(name), value)
    return merged


def add_defaults(written: dict[str, Any]) -> dict[str, Any]:
    """Return the object with the default fields that the API server adds."""
    stored = deepcopy(written)
    spec = stored.get("spec", {})
    ports: list[dict[str, Any]] = []
    match stored["kind"]:
        case "NetworkPolicy":
            ports = [port for rule in spec["ingress"] + spec["egress"] for port in rule["ports"]]
        case "Service":
            stored["spec"] = SERVICE_DEFAULTS | spec
            ports = spec["ports"]
        case "Deployment":
            stored["spec"] = DEPLOYMENT_DEFAULTS | spec
            spec["strategy"].setdefault("type", "RollingUpdate")
            pod = spec["template"]["spec"]
            spec["template"]["spec"] = POD_DEFAULTS | pod
            (container,) = pod["containers"]
            pod["containers"] = [CONTAINER_DEFAULTS | container]
            ports = container["ports"]
        case "HorizontalPodAutoscaler":
            for rules in spec["behavior"].values():
                rules.setdefault("selectPolicy", "Max")
    for port in ports:
        port.setdefault("protocol", "TCP")
    return stored


class ApiServer:
    """An API server; `objects` has the objects by path, `calls` the requests that changed them."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.deleted: list[str] = []  # namespaces whose deletion is not complete
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def kubeconfig(self) -> dict[str, Any]:
        """Return a configuration of kubectl for this server."""
        cluster = {"name": "test", "cluster": {"server": self.url}}
        context = {"name": "test", "context": {"cluster": "test", "user": ""}}
        config = {"clusters": [cluster], "contexts": [context], "current-context": "test"}
        return {"apiVersion": "v1", "kind": "Config"} | config

    def find(self, kind: str) -> dict[str, Any] | None:
        """Return the only object of a kind, or None."""
        found = [stored for stored in self.objects.values() if stored["kind"] == kind]
        return found[0] if found else None

    def respond(self, method: str, path: str, body: Any) -> tuple[HTTPStatus, dict[str, Any]]:
        """Handle a request; return the status and the body of the response."""
        if (found := discover(path)) is not None:
            return HTTPStatus.OK, found
        if method == "GET":
            return self._read(path)
        self.calls.append((method, path))
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
        elif path not in self.objects:
            return NOT_FOUND
        if method == "DELETE":
            self._delete(path)
            return HTTPStatus.OK, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        before = self.objects[path] if method == "PATCH" else {}
        self.objects[path] = add_defaults(merge(before, body))
        if self.objects[path]["kind"] == "HorizontalPodAutoscaler":
            self._scale(self.objects[path])
        return HTTPStatus.OK, self.objects[path]

    def _read(self, path: str) -> tuple[HTTPStatus, dict[str, Any]]:
        if path.rpartition("/")[2] in {plural for _, plural in KINDS.values()}:
            items = [stored for name, stored in self.objects.items() if name.startswith(f"{path}/")]
            listed = {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}}
            return HTTPStatus.OK, listed | {"items": items}
        if path in self.deleted:  # a namespace is deleted asynchronously
            self.deleted.remove(path)
            inside = f"/namespaces/{path.rpartition('/')[2]}"
            self.objects = {
                name: stored for name, stored in self.objects.items() if inside not in name
            }
        return (HTTPStatus.OK, self.objects[path]) if path in self.objects else NOT_FOUND

    def _delete(self, path: str) -> None:
        if self.objects[path]["kind"] == "Namespace":
            self.deleted.append(path)
        else:
            del self.objects[path]

    def _scale(self, autoscaler: dict[str, Any]) -> None:
        """Act as the autoscaler and as the controller of the Deployment, immediately."""
        deployment = self.find("Deployment")
        assert deployment is not None
        count = autoscaler["spec"]["minReplicas"]
        deployment["spec"]["replicas"] = count
        counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
        deployment["status"] = dict.fromkeys(counts, count)
        autoscaler["status"] = {"conditions": [{"type": "AbleToScale", "status": "True"}]}


def discover(path: str) -> dict[str, Any] | None:
    """Return the discovery document of a path, or None if the path names objects."""
    versions = {version for version, _ in KINDS.values()}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": version.partition("/")[0], "versions": [entry], "preferredVersion": entry}
            for version in sorted(versions - {"v1"})
            for entry in [{"groupVersion": version, "version": version.partition("/")[2]}]
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in versions:
        return None
    resources = [
        {"name": plural, "kind": kind, "namespaced": kind != "Namespace", "verbs": VERBS}
        | {"singularName": kind.lower(), "shortNames": SHORT_NAMES.get(kind, [])}
        for kind, (in_version, plural) in KINDS.items()
        if in_version == version
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def _handler_of(api: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            given = json.loads(body) if body else None
            url = urlsplit(self.path)
            code, response = api.respond(self.command, url.path, given)
            is_watch = "watch=true" in url.query  # no later events: an empty stream
            sent = b"" if is_watch else json.dumps(response).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = respond  # noqa: N815 - named by http.server

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Suppress the log."""

    return Handler
