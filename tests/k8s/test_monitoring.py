"""Alerts, dashboard and runbook use only existing metrics, and agree with each other."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import httpx
import psycopg
import pytest
import yaml
from database import Database
from documents import code_in
from programs import find_program
from prometheus_client.parser import text_string_to_metric_families
from servers import RawServer, service_process

from app.errors import PROBLEMS

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "k8s" / "monitoring"
RULES = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["spec"]["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
DEVELOPMENT = {
    document["kind"]: document
    for document in yaml.safe_load_all((ROOT / "k8s" / "deployment.yaml").read_text())
}
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()

DOCUMENTED_QUERIES = code_in(RUNBOOK, "promql")
QUERIES = [
    *((name, rule["expr"]) for name, rule in ALERTS.items()),
    *((panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]),
    *(
        (variable["name"], variable["definition"])
        for variable in DASHBOARD["templating"]["list"][1:]
    ),
]
ITEM = "550e8400-e29b-41d4-a716-446655440000"  # of the runbook
# Labels that Prometheus adds to every series, and the series that it generates.
ADDED_LABELS = {"job", "namespace", "pod"}
ADDED_SERIES = "up"

Metrics = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def metrics(gateway_url: str, products_url: str, database_session: psycopg.Connection) -> Metrics:
    """Return the series of /metrics after a run, with their labels and label values."""
    database = Database(database_session)
    series: Metrics = defaultdict(lambda: defaultdict(set))
    with (
        service_process(gateway_url, products_url) as (_, url),
        RawServer(b"") as broken,
        service_process(gateway_url, broken.url) as (_, url_of_failing),
    ):
        user_id = database.add_user(balance=400)
        item_id = str(database.add_item(price=350))
        body = {"user_id": user_id, "item_id": item_id}
        for key in ("a", "a", "b"):
            httpx.post(f"{url}/payments/debit", json=body, headers={"Idempotency-Key": key})
        httpx.get(f"{url}/payments/outcome", params={"user_id": user_id, "idempotency_key": "a"})
        httpx.post(f"{url_of_failing}/payments/debit", json=body)
        for address in (url, url_of_failing):
            for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
                for sample in family.samples:
                    for label, value in {**sample.labels, "": ""}.items():
                        series[sample.name][label].add(value)
    return series


def read_query(query: str) -> tuple[set[str], list[tuple[str, str, str, str]], set[str]]:
    """Parse a query: return its series, its matchers with their series, its grouping labels."""
    matchers = [
        (series, *matcher)
        for series, inside in re.findall(r"(\w+)\{([^}]*)\}", query)
        for matcher in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside)
    ]
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", query)
    grouped = {
        label
        for inside in re.findall(r"\bby \(([^)]*)\)", bare)
        for label in re.split(r",\s*", inside)
    }
    bare = re.sub(r"\bby \([^)]*\)", "", bare)
    if found := re.fullmatch(r"label_values\((\w+), (\w+)\)", bare):
        return {found[1]}, matchers, {found[2]}
    names = set(re.findall(r"(?<![\w.])[a-z_]\w*(?!\w*\s*\()", bare))
    return names - {"and", "or", "unless"}, matchers, grouped


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(RULES["spec"]))
    ended = subprocess.run(
        [find_program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(rules)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(ALERTS)} rules found" in ended.stdout


def test_every_alert_fires_only_in_its_own_case(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES["spec"]))
    cases = tmp_path / "alerts.yaml"
    shutil.copy(Path(__file__).parent / "alerts.yaml", cases)
    ended = subprocess.run(
        [find_program("promtool"), "test", "rules", str(cases)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks = [
        check
        for test in yaml.safe_load(cases.read_text())["tests"]
        for check in test["alert_rule_test"]
    ]
    for kind in (True, False):
        named = {check["alertname"] for check in checks if bool(check.get("exp_alerts")) is kind}
        assert named == set(ALERTS)


@pytest.mark.parametrize(("name", "query"), QUERIES, ids=[name for name, _ in QUERIES])
def test_a_query_uses_only_series_and_labels_of_the_service(
    metrics: Metrics, name: str, query: str
) -> None:
    names, matchers, grouped = read_query(query)
    assert names
    assert names <= set(metrics) | {ADDED_SERIES}, name
    labels = ADDED_LABELS.union(*(metrics[series] for series in names - {ADDED_SERIES}))
    assert grouped <= labels
    for series, label, operator, value in matchers:
        if series == ADDED_SERIES or label in ADDED_LABELS:
            continue
        known = set(metrics[series][label])
        if operator in {"=~", "!~"}:
            assert any(re.fullmatch(value, known_value) for known_value in known), (label, value)
        elif label != "dependency":
            assert value in known, (label, value)


def test_the_queries_of_the_runbook_use_series_of_the_service_and_are_valid(
    metrics: Metrics, tmp_path: Path
) -> None:
    assert len(DOCUMENTED_QUERIES) == RUNBOOK.count("```promql") > 0
    for query in DOCUMENTED_QUERIES:
        test_a_query_uses_only_series_and_labels_of_the_service(metrics, "runbook", query.strip())
    rules = tmp_path / "rules.yaml"
    recorded = [{"record": "documented", "expr": query} for query in DOCUMENTED_QUERIES]
    rules.write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": recorded}]}))
    command = [find_program("promtool"), "check", "rules", "--lint=none", str(rules)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_the_first_checks_of_the_runbook_show_the_state_of_a_pod(service: httpx.Client) -> None:
    output = run_curl(service, "First checks", {})
    assert '"status":"ready"' in output
    assert "payment_debits_total{" in output


def run_curl(service: httpx.Client, section: str, replaced: Mapping[str, str]) -> str:
    """Run the curl commands of a section of the runbook on the service; return their output."""
    text = RUNBOOK.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (block,) = [block for block in code_in(text, "sh") if block.startswith("curl ")]
    address = f"127.0.0.1:{service.base_url.port}"
    block = block.replace("localhost:8002", address)
    block = block.replace("https://payments.example.org", f"http://{address}")
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    find_program("curl")
    ended = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout


def test_the_runbook_sends_a_debit_again(
    service: httpx.Client, database_session: psycopg.Connection
) -> None:
    database = Database(database_session)
    user_id = database.add_user(balance=500)
    values = {"1001": str(user_id), ITEM: str(database.add_item(price=350))}
    outputs = [json.loads(run_curl(service, "Was somebody charged?", values)) for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert database.balance(user_id) == 150


def test_the_debit_that_tests_a_new_key_charges_nobody(
    service: httpx.Client, database_session: psycopg.Connection
) -> None:
    item_id = str(Database(database_session).add_item(price=350))
    problem = json.loads(run_curl(service, "Rotating the key", {ITEM: item_id}))
    assert problem["code"] == "user_not_found"


def test_the_dependencies_in_queries_exist_in_the_code() -> None:
    code = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
    called = set(re.findall(r'dependency_call\(self\._metrics, "(\w+)"', code))
    used = {value for _, query in QUERIES for value in re.findall(r'dependency="(\w+)"', query)}
    assert used
    assert used <= called


@pytest.mark.parametrize(
    "query", ["payment_debit_total", 'payment_debits_total{outcom="x"}', "sum by (user) (up)"]
)
def test_a_query_for_a_missing_series_or_label_is_detected(metrics: Metrics, query: str) -> None:
    with pytest.raises(AssertionError):
        test_a_query_uses_only_series_and_labels_of_the_service(metrics, "wrong", query)


def test_a_ratio_compares_the_same_requests_over_the_same_range() -> None:
    selector = r"\w+\((\w+)\{([^}]*)\}\[(\w+)\]\)\)"
    ratio = rf"{selector}\s+(?:[<>] [\d.]+ \*|/) sum by \(namespace\) \({selector}"
    by_ratio = {
        name: rule["expr"] for name, rule in ALERTS.items() if re.search(" [*/] ", rule["expr"])
    }
    assert len(by_ratio) == 5
    for name, expression in by_ratio.items():
        ratios = re.findall(ratio, expression)
        assert len(ratios) == len(re.findall(" [*/] ", expression)), name
        for _, part, part_range, _, whole, whole_range in ratios:
            assert part_range == whole_range, name
            (narrower,) = set(part.split(", ")) - set(whole.split(", "))
            assert set(part.split(", ")) - {narrower} == set(whole.split(", ")), name
            assert re.match("status|le|outcome", narrower), name
        assert len({part for _, part, *_ in ratios}) == 1
        # The minimum number of requests is counted over the longest range.
        ((_, counted, counted_range),) = re.findall(rf"{selector}\s*> [\d.]+$", expression, re.M)
        assert counted == (whole if narrower.startswith("le") else part), name
        assert counted_range == whole_range


def test_every_alert_has_a_severity_and_a_runbook_url() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert {"summary", "description"} < set(rule["annotations"])
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_the_runbook_explains_every_alert() -> None:
    assert set(re.findall(r"^### (Payment\w+)$", RUNBOOK, re.MULTILINE)) == set(ALERTS)
    for name, rule in ALERTS.items():
        section = RUNBOOK.split(f"### {name}\n")[1].split("\n#")[0]
        assert section.strip().startswith(f"*{rule['labels']['severity']}*")


def test_the_panels_in_the_steps_of_the_runbook_exist() -> None:
    alerts = RUNBOOK.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", " ".join(alerts.split())))
    assert len(named) >= 4
    for name in named:
        assert any(panel["title"].startswith(name) for panel in PANELS), name


def test_the_runbook_explains_every_problem() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (no|unknown)(?:;[^|]+)? \|", RUNBOOK, re.MULTILINE)
    assert sorted(rows) == sorted(
        (problem.code, str(problem.status), problem.money_moved) for problem in PROBLEMS.values()
    )


def test_prometheus_finds_the_service() -> None:
    monitor = yaml.safe_load((MONITORING / "servicemonitor.yaml").read_text())["spec"]
    service = DEVELOPMENT["Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["namespace"] in monitor["namespaceSelector"]["matchNames"]
    overlay = (ROOT / "k8s" / "overlays" / "production" / "kustomization.yaml").read_text()
    assert yaml.safe_load(overlay)["namespace"] in monitor["namespaceSelector"]["matchNames"]
    (endpoint,) = monitor["endpoints"]
    # No other names: the operator ignores unknown names.
    assert set(monitor) == {"namespaceSelector", "selector", "endpoints"}
    assert set(endpoint) == {"port", "path", "interval", "scrapeTimeout"}
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["path"] == "/metrics"
    assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("15s", "5s")


def test_the_network_policy_allows_the_namespace_of_the_monitoring_objects() -> None:
    policy = DEVELOPMENT["NetworkPolicy"]["spec"]
    allowed = [peer["namespaceSelector"]["matchLabels"] for peer in policy["ingress"][0]["from"]]
    for name in ("servicemonitor", "prometheusrule"):
        found = yaml.safe_load((MONITORING / f"{name}.yaml").read_text())["metadata"]["namespace"]
        assert {"kubernetes.io/metadata.name": found} in allowed


def test_queries_match_the_jobs_of_all_namespaces() -> None:
    # Without a jobLabel, the operator names the job after the Service.
    names = [DEVELOPMENT["Service"]["metadata"]["name"]]
    overlay = ROOT / "k8s" / "overlays" / "production" / "name.yaml"
    names += [patch["value"] for patch in yaml.safe_load(overlay.read_text())]
    assert len(names) == 2
    jobs = {job for _, query in QUERIES for job in re.findall(r'job=~"([^"]+)"', query)}
    assert jobs
    for job in jobs:
        assert all(re.fullmatch(job, name) for name in names)
    # Every process exports these metrics.
    for name, query in QUERIES:
        assert "job=~" in query or not re.search(r"\b(up|process_\w+)\b", query), name


def test_panel_legends_use_the_grouping_labels() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            _, _, grouped = read_query(target["expr"])
            named = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert named == grouped - {"le"} or panel["type"] == "table", panel["title"]


def test_panels_use_the_range_variables_of_grafana() -> None:
    ranges = {
        found for _, query in QUERIES[len(ALERTS) :] for found in re.findall(r"\[(.+?)\]", query)
    }
    assert ranges == {"$__rate_interval", "$__range"}


def test_the_dashboard_opens_on_production_and_every_panel_filters_by_namespace() -> None:
    overlay = yaml.safe_load(
        (ROOT / "k8s" / "overlays" / "production" / "kustomization.yaml").read_text()
    )
    namespace = DASHBOARD["templating"]["list"][1]
    assert namespace["current"]["value"] == [overlay["namespace"]]
    for title, query in QUERIES[len(ALERTS) : -1]:
        series, _, _ = read_query(query)
        assert query.count('namespace=~"$namespace"') >= len(series), title


def test_the_error_ratio_is_zero_without_errors() -> None:
    (panel,) = [panel for panel in PANELS if panel["title"] == "Share of requests that fail"]
    failing, _, _ = panel["targets"][0]["expr"].partition(" / ")
    assert failing.endswith(" or vector(0))")


def test_money_is_shown_in_kronor() -> None:
    (panel,) = [panel for panel in PANELS if "minor_units" in panel["targets"][0]["expr"]]
    assert panel["targets"][0]["expr"].endswith(" / 100")
    assert panel["fieldConfig"]["defaults"]["unit"] == "currencySEK"


def test_kubectl_applies_only_the_service_monitor_and_the_rules() -> None:
    applied = [path for path in MONITORING.iterdir() if path.suffix in {".json", ".yaml", ".yml"}]
    kinds = {yaml.safe_load(path.read_text())["kind"] for path in applied}
    assert kinds == {"ServiceMonitor", "PrometheusRule"}


def test_the_dashboard_uses_the_selected_data_source_and_its_panels_do_not_overlap() -> None:
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    for panel in PANELS:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for first, second in combinations(places, 2):
        beside = first["x"] + first["w"] <= second["x"] or second["x"] + second["w"] <= first["x"]
        below = first["y"] + first["h"] <= second["y"] or second["y"] + second["h"] <= first["y"]
        assert beside or below
