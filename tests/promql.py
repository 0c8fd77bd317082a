"""What a PromQL expression names, and what the services expose: without a parser of all of the language."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from afd.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]
DASHBOARDS = sorted((ROOT / "k8s" / "afd" / "dashboards").glob("*.json"))
ALERTS = ROOT / "k8s" / "afd" / "alerts.yaml"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: prometheus)")

_OF_PROMETHEUS = {"mesh", "job", "instance"}  # labels that it adds
_AGGREGATION = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_KEYWORDS = {"and", "or", "unless", "bool", "offset"}


class Named(NamedTuple):
    metrics: frozenset[str]
    labels: frozenset[str]


def named(expression: str) -> Named:
    """The metrics and labels in it."""
    rest = re.sub(r'"[^"]*"', '""', expression)
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", rest))
    labels |= {label for group in _AGGREGATION.findall(rest) for label in re.findall(r"\w+", group)}
    rest = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", _AGGREGATION.sub("", rest))
    words = re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*(?!\w|\s*\()", rest)
    return Named(frozenset(words) - _KEYWORDS, frozenset(labels))


def check(expressions: Iterable[str], folder: Path) -> str:
    """What promtool says of them; empty if they are PromQL."""
    rules = [{"record": f"expression:{number}", "expr": each} for number, each in enumerate(expressions)]
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    return promtool("check", "rules", str(path))


def promtool(*arguments: str) -> str:
    """What it complains about; empty if all is well."""
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120, check=False)
    return result.stdout + result.stderr if result.returncode else ""


def exposed(mesh: Mesh) -> dict[str, set[str]]:
    """The names of all series that the mesh's services have, and the labels of those that there are just now."""
    names: dict[str, set[str]] = {"up": set(_OF_PROMETHEUS)}
    for service in mesh.services:
        assert service.replica is not None
        with urllib.request.urlopen(f"http://{service.replica.metrics_address}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for suffix in _SUFFIXES.get(family.type, ()):
                    names.setdefault(family.name + suffix, set(_OF_PROMETHEUS))
                for sample in family.samples:
                    names.setdefault(sample.name, set(_OF_PROMETHEUS)).update(sample.labels)
    return names


def documented_labels() -> dict[str, set[str]]:
    """Of each metric with labels of its own, as docs/metrics.md has it: `afd_requests{status}`."""
    tables = (ROOT / "docs" / "metrics.md").read_text().partition("## Bubbles")[0]
    return {name: set(labels.split(",")) for name, labels in re.findall(r"`(\w+)\{([\w,]+)\}`", tables)}


def unknown(expressions: Iterable[str], mesh: Mesh) -> list[str]:
    """Sentences about metrics that no service exposes, and labels that none of an expression's metrics has. Names with
    a colon are those of recording rules."""
    series, documented = exposed(mesh), documented_labels()
    problems = []
    for expression in expressions:
        metrics, labels = named(expression)
        own = {metric for metric in metrics if ":" not in metric}
        problems += [f"{metric} is exposed by nobody: {expression}" for metric in own - series.keys()]
        known = {label for metric in own for label in series.get(metric, ())}
        known |= {label for metric in own for label in documented.get(re.sub("_total$", "", metric), ())}
        problems += [f"no metric has the label {label}: {expression}" for label in labels - known if own]
    return problems
