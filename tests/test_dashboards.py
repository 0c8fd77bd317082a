"""The dashboards of k8s/afd/dashboards can be imported by Grafana, and ask for what the services expose."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.mesh import Mesh
from tests import promql
from tests.conftest import Model, StartMesh
from tests.test_losses import generate

Dashboard = dict[str, Any]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
each_dashboard = pytest.mark.parametrize("dashboard", promql.DASHBOARDS, ids=lambda path: path.stem, indirect=True)


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Dashboard:
    loaded: Dashboard = json.loads(request.param.read_text())
    return loaded


def targets(dashboard: Dashboard) -> list[dict[str, Any]]:
    return [target for panel in dashboard["panels"] for target in panel["targets"]]


def filled_in(dashboard: Dashboard, expression: str) -> str:
    """With values for Grafana's variables."""
    chosen = {each["name"]: each["current"].get("value") for each in dashboard["templating"]["list"]}
    values = {**chosen, "mesh": "compose", "job": ".*", "instance": ".*", "__rate_interval": "1m"}
    return re.sub(r"\$(\w+)", lambda variable: values[variable[1]], expression)


def expressions(dashboard: Dashboard) -> list[str]:
    return [filled_in(dashboard, target["expr"]) for target in targets(dashboard)]


@pytest.fixture(scope="module")
def mesh(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(make_model(4).path, 1, 2) as mesh:
        asyncio.run(generate(mesh, 8, {}))
        yield mesh


def test_there_is_a_dashboard_for_each_question() -> None:
    assert [path.stem for path in promql.DASHBOARDS] == ["cost", "overview", "pipeline", "reliability"]


@each_dashboard
def test_a_dashboard_has_what_grafana_needs(dashboard: Dashboard) -> None:
    assert dashboard["uid"].startswith("afd-")
    assert dashboard["title"].startswith("AFD Mesh: ")
    assert dashboard["schemaVersion"] >= 39
    assert "id" not in dashboard, "Grafana gives it"
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables)[:4] == ["datasource", "mesh", "job", "instance"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert all(variables[name]["datasource"] == DATASOURCE for name in ("mesh", "job", "instance"))


@each_dashboard
def test_one_mesh_is_chosen_and_then_of_its_jobs_and_instances(dashboard: Dashboard) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    queries = {name: variables[name]["query"]["query"] for name in ("mesh", "job", "instance")}
    assert queries == {
        "mesh": "label_values(afd_requests_open, mesh)",
        "job": 'label_values(up{mesh="$mesh"}, job)',
        "instance": 'label_values(up{mesh="$mesh",job=~"$job"}, instance)',
    }
    assert all(variables[name]["definition"] == query for name, query in queries.items())
    assert not variables["mesh"]["multi"]
    assert not variables["mesh"]["includeAll"]


@each_dashboard
def test_every_panel_says_what_it_shows(dashboard: Dashboard) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == DATASOURCE
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["datasource"] == DATASOURCE and target["legendFormat"] for target in panel["targets"])


@each_dashboard
def test_panels_lie_beside_one_another(dashboard: Dashboard) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


@each_dashboard
def test_every_series_is_of_the_chosen_mesh_jobs_and_instances(dashboard: Dashboard) -> None:
    for target in targets(dashboard):
        selectors = re.findall(r"\b(?:afd|gen_ai)_\w+(\{[^}]*\})?", target["expr"])
        assert selectors
        chosen = '{mesh="$mesh",job=~"$job",instance=~"$instance"'
        assert all(selector.startswith(chosen) for selector in selectors), target["expr"]


@each_dashboard
def test_legends_name_labels_that_the_series_keep(dashboard: Dashboard) -> None:
    documented = promql.documented_labels()
    for target in targets(dashboard):
        expression = target["expr"]
        aggregated = re.match(r"\(*(?:sum|avg|min|max|count)(?: by \(([^)]*)\))?", expression)
        if aggregated:
            kept = set(re.findall(r"\w+", aggregated[1] or ""))
        else:
            families = {metric.removesuffix("_total") for metric in promql.named(expression).metrics}
            kept = {"job", "instance"}.union(*(documented.get(family, set()) for family in families))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, expression


@promql.needs_promtool
@each_dashboard
def test_every_expression_is_promql(dashboard: Dashboard, tmp_path: Path) -> None:
    assert promql.check(expressions(dashboard), tmp_path) == ""


@each_dashboard
def test_every_metric_and_label_is_one_that_the_services_have(dashboard: Dashboard, mesh: Mesh) -> None:
    assert promql.unknown(expressions(dashboard), mesh) == []


def test_labels_are_those_of_the_documentation(mesh: Mesh) -> None:
    """Of the series that there are."""
    documented = promql.documented_labels()
    for name, labels in promql.exposed(mesh).items():
        family = re.sub("_(total|bucket|sum|count)$", "", name)
        if name.startswith(("afd_", "gen_ai_")) and not name.endswith("_created"):
            own = labels - {"mesh", "job", "instance", "le"}
            assert own in (set(), documented.get(family, set())), name


def test_what_an_expression_names_is_found() -> None:
    rate = 'histogram_quantile(0.9, sum by (le) (rate(a_bucket{job=~"x y",le="1.0"}[5m])))'
    found = promql.named(f"{rate} / on (i) group_left () b:c unless d")
    assert found == (frozenset({"a_bucket", "b:c", "d"}), frozenset({"job", "le", "i"}))
