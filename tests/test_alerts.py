"""The alert rules of k8s/afd/alerts.yaml are rules for Prometheus, and fire when they should."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from services.gateway import metrics
from tests import promql
from tests.conftest import Model, StartMesh
from tests.test_losses import generate

TESTS = Path(__file__).with_name("alerts_test.yaml")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(promql.ALERTS.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@promql.needs_promtool
def test_the_rules_are_prometheus_rules() -> None:
    assert promql.promtool("check", "rules", "--lint-fatal", str(promql.ALERTS)) == ""


@promql.needs_promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    assert promql.promtool("test", "rules", str(TESTS)) == ""


def test_no_alert_is_untested() -> None:
    cases = [expected for test in yaml.safe_load(TESTS.read_text())["tests"] for expected in _firing(test)]
    assert set(alerts()) == set(cases)


def _firing(test: dict[str, Any]) -> list[str]:
    """The alerts that are expected in it."""
    samples = [sample["labels"] for each in test.get("promql_expr_test", ()) for sample in each["exp_samples"]]
    names = re.findall(r'alertname="(\w+)"', " ".join(samples))
    return names + [each["alertname"] for each in test.get("alert_rule_test", ()) if each["exp_alerts"]]


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_what_to_look_at(name: str) -> None:
    alert = alerts()[name]
    assert name.startswith("Afd")
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert not alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["description"].endswith(".")
    assert len(alert["annotations"]["description"]) > len(alert["annotations"]["summary"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_no_rule_sums_over_meshes(rule: dict[str, Any]) -> None:
    assert re.findall(r"\b(?:sum|avg|min|max|count|group)\b(?! by \(mesh\b).*", rule["expr"]) == []


def test_rules_name_what_the_services_have_and_what_other_rules_record(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    expressions = [rule["expr"] for rule in rules()]
    with start_mesh(make_model(4).path, 1, 2) as mesh:
        asyncio.run(generate(mesh, 8, {}))
        assert promql.unknown(expressions, mesh) == []
    names = {name for expression in expressions for name in promql.named(expression).metrics if ":" in name}
    assert names == {rule["record"] for rule in rules() if "record" in rule}


def test_the_slos_are_buckets_of_the_histograms() -> None:
    """A `le` that is none has no series, and its alert never fires."""
    bounds = {le for rule in rules() for le in re.findall(r'le="([^"]+)"', rule["expr"])}
    text = prometheus_client.generate_latest(metrics.TTFT).decode()  # type: ignore[arg-type]
    assert bounds == {"1.0", "0.1"}
    assert bounds < set(re.findall(r'le="([^"]+)"', text))
