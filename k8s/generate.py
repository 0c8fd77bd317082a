"""Makes what can be made of the chart: values.schema.json, of values.yaml and the settings of afd/config.py, and the
table of values in the chart's README, of the comments in values.yaml.

    python -m k8s.generate
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from afd.config import SETTINGS_OF, DtypeName, ServiceSettings

CHART = Path(__file__).resolve().parent / "afd"
BEGIN, END = "<!-- made by python -m k8s.generate -->\n", "<!-- end -->\n"

# Settings that the chart, or the image, sets: no value may say otherwise.
DECIDED = {
    "model", "redis", "redis_ca", "mesh", "replica_id", "host", "advertise_host", "advertise_port", "grpc_port",
    "metrics_port", "health_port", "http_port", "tls", "public_tls", "insecure", "startup_timeout_s",
    "drain_timeout_s", "dtype", "device", "ffn_shards", "shard", "served_model_name", "require_api_key",
}  # fmt: skip

_KEY = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$"  # of a label or an annotation
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}, "propertyNames": {"pattern": _KEY}}
_LABEL = {"type": "string", "pattern": r"^([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?$"}
_LABELS = {"type": "object", "additionalProperties": _LABEL, "propertyNames": {"pattern": _KEY}}
_FREE = {"type": "object"}  # as Kubernetes has it, which knows itself what is wrong
_NAME = {"type": "string", "pattern": r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"}  # of something in the cluster
_HOSTNAMES = {"type": "array", "items": {"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"}}
_TAG = {"type": "string", "pattern": r"^(\w[\w.-]{0,127})?$"}
_FOLDER = {"type": "string", "pattern": "^(/.*)?$"}
_SIZE = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?"
_QUANTITY = {"type": ["string", "number"], "pattern": f"^{_SIZE}$", "minimum": 0}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}
_SECONDS = {"type": "integer", "minimum": 1, "maximum": 86400}
_KEPT_LABELS = r"^(app\.kubernetes\.io/(name|instance|component)|afd/.*)$"
_SET_LABELS = r"^(app\.kubernetes\.io/(name|instance|component|version|managed-by)|helm\.sh/chart|grafana_dashboard)$"
_ISSUER = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "kind": {"enum": ["Issuer", "ClusterIssuer"]},
        "group": {"type": "string"},
    },
    "dependencies": {"kind": ["name"], "group": ["name"]},
}
_REPLICAS = {"type": "integer", "minimum": 0, "maximum": 10_000}
_SCALED = {"type": "integer", "minimum": 1, "maximum": 10_000}
_SHARDS = {"type": "integer", "minimum": 0, "maximum": 256}
_NAMED: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 1}},
}


def _closed(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


_TEXT = {"type": "string"}
_SELECTOR = _closed(matchLabels=_LABELS, matchExpressions={"type": "array", "items": _FREE})
_IP_BLOCK = _closed("cidr", cidr=_TEXT, **{"except": {"type": "array", "items": _TEXT}})
_PEER = {**_closed(podSelector=_SELECTOR, namespaceSelector=_SELECTOR, ipBlock=_IP_BLOCK), "minProperties": 1}
_TOLERATION = _closed(
    key=_TEXT,
    operator=_TEXT,
    value=_TEXT,
    effect={"enum": ["", "NoSchedule", "PreferNoSchedule", "NoExecute"]},
    tolerationSeconds={"type": "integer"},
)
_SOURCES = ("configMapKeyRef", "fieldRef", "fileKeyRef", "resourceFieldRef", "secretKeyRef")
_SOURCE = {**_closed(**dict.fromkeys(_SOURCES, _FREE)), "minProperties": 1, "maxProperties": 1}
_VARIABLE = _closed("name", name={"type": "string", "pattern": r"^[A-Za-z_.-][\w.-]*$"}, value=_TEXT, valueFrom=_SOURCE)
_VOLUME_TYPES = (
    "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "configMap", "csi", "downwardAPI", "emptyDir",
    "ephemeral", "fc", "flexVolume", "flocker", "gcePersistentDisk", "gitRepo", "glusterfs", "hostPath", "image",
    "iscsi", "nfs", "persistentVolumeClaim", "photonPersistentDisk", "portworxVolume", "projected", "quobyte", "rbd",
    "scaleIO", "secret", "storageos", "vsphereVolume",
)  # fmt: skip
_VOLUME_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
_VOLUME = {
    **_closed("name", name=_VOLUME_NAME, **dict.fromkeys(_VOLUME_TYPES, _FREE)),
    "minProperties": 2,  # its name, and what it is
    "maxProperties": 2,
}
_MOUNT = _closed(
    "name",
    "mountPath",
    name=_VOLUME_NAME,
    mountPath={"type": "string", "pattern": "^/[^:]*[^:/]$"},
    readOnly={"type": "boolean"},
    recursiveReadOnly=_TEXT,
    subPath=_TEXT,
    subPathExpr=_TEXT,
    mountPropagation=_TEXT,
)

# By path or last name: what the default alone does not tell.
_SHAPES: dict[str, Any] = {
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.registry": {"type": "string", "pattern": "^(.*/)?$"},
    "image.tag": _TAG,
    "imageTag": _TAG,
    "image.pullSecrets": {"type": "array", "items": {**_NAME, "minLength": 1}},
    "model.persistentVolumeClaim": _NAME,
    "hostPath": _FOLDER,
    "model.subPath": {"type": "string", "not": {"pattern": r"^/|(^|/)\.\.(/|$)"}},
    "model.dtype": {"enum": list(get_args(DtypeName))},
    "mesh": {"type": "string", "pattern": r"^[\w.-]*$"},
    "startupSeconds": _SECONDS,
    "drainSeconds": _SECONDS,
    "host": {"enum": ["0.0.0.0", "::"]},
    "serviceAccount": _NAME,
    "tls.certManager.issuer": _ISSUER,
    "tls.certManager.publicIssuer": _ISSUER,
    "tls.certManager.publicNames": _HOSTNAMES,
    "tls.secrets.gateway": _NAME,
    "tls.secrets.attention": _NAME,
    "tls.secrets.ffn": _NAME,
    "tls.secrets.public": _NAME,
    "sharedMemory.size": {"type": "string", "pattern": f"^{_SIZE}$"},
    "telemetry.otlpEndpoint": {"type": "string", "pattern": "^(https?://.*)?$"},
    "gateway.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "gateway.service.annotations": _TEXTS,
    "gateway.service.ipFamilyPolicy": {"enum": ["", "SingleStack", "PreferDualStack", "RequireDualStack"]},
    "gateway.route.parents": {"type": "array", "items": _NAMED},
    "gateway.route.hostnames": _HOSTNAMES,
    "replicas": _REPLICAS,
    "minReplicas": _SCALED,
    "maxReplicas": _SCALED,
    "gateway.autoscaling.targetCPU": {"type": "integer", "minimum": 1},
    "attention.autoscaling.prometheus": {"type": "string", "pattern": "^(https?://.+)?$"},
    "attention.autoscaling.waitingPerReplica": {"type": "integer", "minimum": 1},
    "attention.autoscaling.kvUse": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "attention.autoscaling.triggerAuthentication": _NAME,
    "attention.autoscaling.authModes": {"enum": ["bearer", "basic", "tls", "custom"]},
    "runtimeClass": _NAME,
    "priorityClass": _NAME,
    "gpu.count": {"type": "integer", "minimum": 0, "maximum": 1},
    "ffn.shards": _SHARDS,
    "ffn.nextShards": _SHARDS,
    "redis.maxMemory": {"type": "string", "pattern": "^[1-9][0-9]*(kb|mb|gb)$"},
    "redis.external.secret": _NAME,
    "redis.image": {"type": "string", "pattern": r"^[\w.:/@-]+$"},
    "redis.storage": {"type": "string", "pattern": f"^({_SIZE})?$"},
    "redis.storageClass": _NAME,
    "monitoring.labels": {**_LABELS, "propertyNames": {"pattern": _KEY, "not": {"pattern": _SET_LABELS}}},
    "requests": _QUANTITIES,
    "limits": _QUANTITIES,
    "nodeSelector": _LABELS,
    "affinity": _closed(nodeAffinity=_FREE, podAffinity=_FREE, podAntiAffinity=_FREE),
    "tolerations": {"type": "array", "items": _TOLERATION},
    "clients": {"type": "array", "items": _PEER},
    "metrics": {"type": "array", "items": _PEER},
    "podLabels": {**_LABELS, "propertyNames": {"pattern": _KEY, "not": {"pattern": _KEPT_LABELS}}},
    "podAnnotations": _TEXTS,
    "extraEnv": {"type": "array", "items": _VARIABLE},
    "extraVolumes": {"type": "array", "items": _VOLUME},
    "extraVolumeMounts": {"type": "array", "items": _MOUNT},
}


def schema() -> dict[str, Any]:
    """Of values.yaml: its keys and no others, at every depth."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    made = _shape(values, ())
    made["properties"]["global"] = _FREE  # Helm's own, where this chart is part of another one
    settings: dict[str, type[ServiceSettings]] = {"all": ServiceSettings, **SETTINGS_OF}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **made,
        "definitions": {name: _settings_schema(kind) for name, kind in settings.items()},
    }


def _shape(default: Any, path: tuple[str, ...]) -> dict[str, Any]:
    if path and path[-1] == "settings":
        return {"$ref": f"#/definitions/{path[0] if len(path) > 1 else 'all'}"}
    for name in (".".join(path), ".".join(path[-2:]), path[-1] if path else ""):
        if name in _SHAPES:
            return dict(_SHAPES[name])
    match default:
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer", "minimum": 0}
        case str():
            return {"type": "string"}
        case dict() if default:
            keys = {key: _shape(value, (*path, key)) for key, value in default.items()}
            # Helm takes null as "without the default": a section that is not there would fail open.
            return {"type": "object", "additionalProperties": False, "required": sorted(keys), "properties": keys}
    raise ValueError(f"the shape of {'.'.join(path)} is not known: add it to _SHAPES")


def _settings_schema(kind: type[ServiceSettings]) -> dict[str, Any]:
    found = kind.model_json_schema()["properties"]
    keys = {name: _setting_schema(name, found[name]) for name in sorted(found.keys() - DECIDED)}
    return {"type": "object", "additionalProperties": False, "properties": keys}


def _setting_schema(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """As pydantic has it, without what a value cannot be: none."""
    if name == "cpus":
        return {"type": ["string", "integer"], "description": found["description"]}
    if name == "microbatches":
        most = {"type": "integer", "minimum": 1, "maximum": 64}
        return {"anyOf": [most, {"const": "auto"}], "description": found["description"]}
    kept = {key: value for key, value in found.items() if key not in ("default", "title", "format")}
    choices = [choice for choice in kept.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        kept = {**choices[0], **kept}
    elif choices:
        kept["anyOf"] = choices
    return {key: value for key, value in kept.items() if key != "format"}


def table(values_text: str) -> str:
    """Markdown, a row for each line of values.yaml that has a value."""
    rows = ["| value | default | |", "|---|---|---|"]
    rows += [f"| `{path}` | `{default}` | {text} |" for path, default, text in rows_of(values_text)]
    return "\n".join(rows) + "\n"


def rows_of(values_text: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and comment of each value."""
    parents: list[str] = []
    for line in values_text.splitlines():
        found = re.fullmatch(r"( *)([\w]+):(?: (.*?))?(?:  # (.*))?", line)
        if found is None:
            continue
        depth = len(found[1]) // 2
        parents[depth:] = [found[2]]
        if found[3]:
            yield ".".join(parents), found[3], found[4] or ""


def with_table(readme: str, values_text: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(values_text)}{END}{after}"


def main() -> None:
    (CHART / "values.schema.json").write_text(json.dumps(schema(), indent=2) + "\n")
    readme = CHART / "README.md"
    readme.write_text(with_table(readme.read_text(), (CHART / "values.yaml").read_text()))


if __name__ == "__main__":
    main()
