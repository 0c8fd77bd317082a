"""The Helm chart, without a cluster: rendered by Helm's own engine, held against Kubernetes' schemas, the services'
settings, the architecture, compose.yaml, and what the documentation says."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from afd.cli import app
from afd.config import SETTINGS_OF, ServiceSettings, load_settings, parse_microbatches, refuse_plain_text
from afd.tls import name_of
from afd.v1 import gateway_pb2
from tests.fake_cluster import fake_cluster
from tests.redis_servers import one_server
from tests.test_redis_secured import acl_rules, use_everything

helm_python = pytest.importorskip("helm_python", reason="Helm's engine (helm-python-sdk) is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

from k8s import generate  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "k8s" / "afd"
KUBERNETES = "1.32"
# Kinds that Kubernetes does not know by itself, and kubernetes-validate not at all.
OTHERS_KINDS = {"Certificate", "HTTPRoute", "LeaderWorkerSet", "PodMonitor", "PrometheusRule", "ScaledObject"}
ROLES = ("gateway", "attention", "ffn")
TASKS = ("layout", "test")
WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet", "Job", "Pod")

Object = dict[str, Any]

LEAST: Object = {"model": {"name": "m", "hostPath": "/m"}, "insecure": True}
NAMES = {"gateway": "a", "attention": "b", "ffn": "c", "public": "d"}
# What no example has.
CASES: dict[str, Object] = {
    "least": LEAST,
    "resharding": {**LEAST, "ffn": {"shards": 2, "nextShards": 3, "replicas": 2}},
    "resharding groups": {**LEAST, "ffn": {"shards": 2, "nextShards": 3, "leaderWorkerSet": True}},
    "bare": {
        **LEAST,
        "redis": {"external": {"secret": "given"}},
        "networkPolicies": {"enabled": False},
        "podDisruptionBudgets": {"enabled": False},
        "ffn": {"checkLayout": False},
    },
    "everything named": {
        "image": {"registry": "r.example/x/", "tag": "7", "pullSecrets": ["pull"]},
        "model": {"name": "m", "persistentVolumeClaim": "claim", "subPath": "m/1", "dtype": "float32"},
        "tls": {"secrets": NAMES},
        "redis": {"password": "of-mine_1", "storageClass": "fast", "tolerations": [{"operator": "Exists"}]},
        "mesh": "eu.llm",
        "settings": {"log_level": "debug", "lease_s": 2.5, "journal_ttl_s": 1234.5},
        "gateway": {
            "settings": {"log_level": "error"},
            "service": {"type": "LoadBalancer", "annotations": {"a.example/b": "c"}},
            "podLabels": {"team": "llm"},
            "podAnnotations": {"a.example/b": "c"},
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        },
        "attention": {"affinity": {"nodeAffinity": {}}, "settings": {"cpus": "0,2-3", "microbatches": 4}},
        "rail": {"topologyKey": "rail"},
    },
    "where the namespace decides": {
        "model": LEAST["model"],
        "tls": {
            "certManager": {
                "issuer": {"name": "inner"},
                "publicIssuer": {"name": "acme", "kind": "ClusterIssuer"},
                "publicNames": ["llm.example.com"],
            }
        },
        "host": "::",
        "serviceAccount": "llm",
        "fixedUsers": False,
        "topologySpread": False,
        "telemetry": {"otlpEndpoint": "http://collector:4317"},
        "gateway": {
            "service": {
                "type": "LoadBalancer",
                "loadBalancerClass": "a.example/lb",
                "ipFamilyPolicy": "PreferDualStack",
            },
            "route": {"parents": [{"name": "public", "namespace": "ingress"}], "hostnames": ["llm.example.com"]},
            "nodeSelector": {"pool": "general"},
            "tolerations": [{"operator": "Exists"}],
            "priorityClass": "high",
            "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "a=b"}],
            "extraVolumes": [{"name": "proxy", "configMap": {"name": "proxy"}}],
            "extraVolumeMounts": [{"name": "proxy", "mountPath": "/etc/proxy"}],
        },
        "attention": {
            "autoscaling": {
                "enabled": True,
                "prometheus": "https://prometheus:9090",
                "triggerAuthentication": "who-asks",
                "authModes": "basic",
            }
        },
        "networkPolicies": {
            "metrics": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
        },
        "podDisruptionBudgets": {"redis": True},
    },
    "certificates of both kinds": {
        "model": LEAST["model"],
        "tls": {"certManager": {"issuer": {"name": "inner"}}, "secrets": {"public": "d"}},
    },
}


def examples() -> dict[str, Object]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "examples").glob("*.yaml"))}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice in {node.start_mark}: {keys}"
        return super().construct_mapping(node, deep)


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    assert selector, "an empty selector selects everything"
    return selector.items() <= labels.items()


@dataclass(frozen=True)
class Workload:
    """What makes pods, and the pod it makes."""

    manifest: Object
    pod: Object

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.pod["metadata"]["labels"])

    @property
    def role(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> Object:
        return dict(self.pod["spec"])

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}


@dataclass(frozen=True)
class Rendered:
    """All that Helm would give a cluster, as release `mesh` in namespace `llm`."""

    values: Object  # the chart's own, and those that were given
    objects: list[Object] = field(repr=False)
    notes: str = field(repr=False)

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    @functools.cached_property
    def workloads(self) -> list[Workload]:
        return [Workload(each, _pod_of(each)) for each in self.of(*WORKLOADS)]

    def of_role(self, role: str) -> list[Workload]:
        return [workload for workload in self.workloads if workload.role == role]

    @property
    def services(self) -> list[Workload]:
        return [workload for workload in self.workloads if workload.role in ROLES]


def _pod_of(workload: Object) -> Object:
    if workload["kind"] == "Pod":
        return workload
    if workload["kind"] == "LeaderWorkerSet":
        return dict(workload["spec"]["leaderWorkerTemplate"]["workerTemplate"])
    return dict(workload["spec"]["template"])


def render(values: Object, chart: Path = CHART, name: str = "mesh") -> Rendered:
    with helm_python.Chart.load(str(chart)) as loaded:
        loaded.validate_schema(values)
        files = loaded.render(values, name=name, namespace="llm")
        merged = loaded.merge_values(values)
    notes = files.pop("afd/templates/NOTES.txt")
    objects = [each for text in files.values() for each in yaml.load_all(text, _Loader) if each]
    return Rendered(merged, objects, notes)


@functools.cache
def case(name: str) -> Rendered:
    return render((examples() | CASES)[name])


@pytest.fixture(params=[*examples(), *CASES])
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return case(request.param)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("AFD_"):
            monkeypatch.delenv(name)
    return monkeypatch


# --- Kubernetes takes it ---


def test_it_is_what_kubernetes_knows(rendered: Rendered) -> None:
    unknown = set()
    for each in rendered.objects:
        try:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add(each["kind"])
    assert unknown <= OTHERS_KINDS
    for each in rendered.of("LeaderWorkerSet"):  # what is in it, Kubernetes knows
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": _pod_of(each)["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_nothing_is_left_empty(rendered: Rendered) -> None:
    """As a list without items is in a template: Kubernetes takes it, and it says something else than it seems to."""

    def holes(value: object, path: str) -> Iterator[str]:
        if value is None:
            yield path
        parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        for key, each in parts:
            yield from holes(each, f"{path}.{key}")

    assert [hole for each in rendered.objects for hole in holes(each, each["metadata"]["name"])] == []


def test_the_validation_sees_a_typing_error() -> None:
    service = {**case("least").of("Service")[0], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)


def test_names_are_legal_and_used_once(rendered: Rendered) -> None:
    longest = {"StatefulSet": 52, "LeaderWorkerSet": 45}  # names of pods and revisions are made of theirs
    for each in rendered.objects:
        name = each["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name), name
        assert len(name) <= longest.get(each["kind"], 63), name
    (twice, number), *_ = Counter((each["kind"], each["metadata"]["name"]) for each in rendered.objects).most_common(1)
    assert number == 1, twice


def test_names_of_the_longest_release_and_most_shards_are_legal() -> None:
    values = {**LEAST, "ffn": {"shards": 100}}
    test_names_are_legal_and_used_once(render(values, name="r" * 32))
    with pytest.raises(helm_python.HelmError, match="give it one of up to 32 characters"):
        render(values, name="r" * 33)


def test_labels_are_texts_that_kubernetes_takes() -> None:
    for each in render(LEAST, name="on").objects:  # not true
        for label in each["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", label)


def test_selectors_find_their_own_pods_and_no_others(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        if selector := workload.manifest["spec"].get("selector"):
            found = [other.name for other in rendered.workloads if matches(selector["matchLabels"], other.labels)]
            assert found == [workload.name]
    for kind in ("Service", "PodDisruptionBudget"):
        for each in rendered.of(kind):
            selector = each["spec"]["selector"]
            found = [one for one in rendered.workloads if matches(selector.get("matchLabels", selector), one.labels)]
            role = each["metadata"]["labels"]["app.kubernetes.io/component"]
            assert found == rendered.of_role(role)
            assert found


def test_pods_spread_by_their_own_kind_and_prefer_the_rail_of_the_other(rendered: Rendered) -> None:
    for workload in rendered.services:
        spreads = workload.spec.get("topologySpreadConstraints", [])
        assert len(spreads) == rendered.values["topologySpread"]
        assert all(matches(spread["labelSelector"]["matchLabels"], workload.labels) for spread in spreads)
        wants_rail = workload.role != "gateway" and rendered.values["rail"]["topologyKey"]
        if not wants_rail or rendered.values[workload.role]["affinity"]:
            assert workload.spec.get("affinity", {}) == rendered.values[workload.role]["affinity"]
            continue
        (near,) = workload.spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert near["podAffinityTerm"]["topologyKey"] == wants_rail
        selector = near["podAffinityTerm"]["labelSelector"]["matchLabels"]
        found = [other for other in rendered.workloads if matches(selector, other.labels)]
        assert found == rendered.of_role({"attention": "ffn", "ffn": "attention"}[workload.role])


def test_the_example_of_one_node_stays_on_one_node() -> None:
    compute = [each for each in case("one-node-8-gpus").services if each.role != "gateway"]
    assert {each.spec["nodeSelector"]["kubernetes.io/hostname"] for each in compute} == {"gpu-node-1"}


def test_what_scales_and_names_others_names_what_is_there(rendered: Rendered) -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in rendered.objects}
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in rendered.of("HorizontalPodAutoscaler", "ScaledObject")}
    for each in rendered.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
    for workload in rendered.of_role("gateway") + rendered.of_role("attention"):
        values = rendered.values[workload.role]
        assert (workload.name in scaled) == values["autoscaling"]["enabled"]
        first = values["autoscaling"]["minReplicas"] if workload.name in scaled else values["replicas"]
        assert workload.manifest["spec"]["replicas"] == first
    for each in rendered.of("StatefulSet"):
        assert ("Service", each["spec"]["serviceName"]) in there


def test_every_role_has_a_budget_unless_that_is_not_wanted(rendered: Rendered) -> None:
    budgets = {each["metadata"]["name"]: each["spec"]["maxUnavailable"] for each in rendered.of("PodDisruptionBudget")}
    wanted = rendered.values["podDisruptionBudgets"]
    of_redis = {"mesh-afd-redis": 0} if wanted["redis"] else {}
    assert budgets == ({f"mesh-afd-{role}": 1 for role in ROLES} | of_redis if wanted["enabled"] else {})


# --- the pods ---


def dockerfile(role: str) -> str:
    return (ROOT / "services" / role / "Dockerfile").read_text()


def image_environment(role: str) -> dict[str, str]:
    """The AFD_* that the image has."""
    return dict(re.findall(r"\b(AFD_\w+)=(\S+)", dockerfile(role)))


def test_ports_and_probes_are_those_of_the_images(rendered: Rendered) -> None:
    for workload in rendered.services:
        variables = image_environment(workload.role)
        wanted = {name: int(variables[f"AFD_{name.upper()}_PORT"]) for name in workload.ports}
        assert workload.ports == wanted
        (exposed,) = re.findall(r"^EXPOSE (.*)$", dockerfile(workload.role), re.MULTILINE)
        assert sorted(workload.ports.values()) == sorted(map(int, exposed.split()))
        ready, alive = {"port": wanted["health"], "service": "ready"}, {"port": wanted["health"], "service": ""}
        probes = [workload.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        assert [probe["grpc"] for probe in probes] == [ready, ready, alive]
        startup_s = probes[0]["periodSeconds"] * probes[0]["failureThreshold"]
        assert startup_s == 2 * rendered.values["startupSeconds"], "for the weights, and for the others"


def test_services_lead_to_ports_that_are_there(rendered: Rendered) -> None:
    for service in rendered.of("Service"):
        for workload in rendered.workloads:
            if matches(service["spec"]["selector"], workload.labels):
                for port in service["spec"]["ports"]:
                    assert workload.ports[port["targetPort"]] == port["port"]
    (balanced,) = [each for each in rendered.of("Service") if each["spec"].get("clusterIP") != "None"]
    assert balanced["metadata"]["name"] == "mesh-afd-gateway", "gRPC would stay with one pod of the others"
    assert [port["name"] for port in balanced["spec"]["ports"]] == ["http", "grpc"]


def test_volumes_and_mounts_belong_together(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        claims = [each["metadata"]["name"] for each in workload.manifest["spec"].get("volumeClaimTemplates", [])]
        volumes = [*claims, *(volume["name"] for volume in workload.spec["volumes"])]
        mounts = workload.container["volumeMounts"]
        assert sorted(volumes) == sorted(mount["name"] for mount in mounts)
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        if workload.role in ROLES:
            paths = {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts}
            assert (paths["/model"], paths["/tmp"]) == (True, False)
            assert ("/dev/shm" in paths) == (workload.role != "gateway")


def secrets_used(workload: Workload) -> Iterator[tuple[str, str]]:
    """Name and key of what a pod reads."""
    for variable in workload.container.get("env", []):
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            yield reference["name"], reference["key"]
    for volume in workload.spec["volumes"]:
        if secret := volume.get("secret"):
            keys = [item["key"] for item in secret.get("items", [])] or ["tls.crt", "tls.key", "ca.crt"]
            yield from ((secret["secretName"], key) for key in keys)


def test_every_secret_is_made_or_given(rendered: Rendered) -> None:
    certificate = {"tls.crt", "tls.key", "ca.crt"}
    there = {each["metadata"]["name"]: set(each["stringData"]) for each in rendered.of("Secret")}
    there |= {each["spec"]["secretName"]: certificate for each in rendered.of("Certificate")}
    there |= {name: certificate for name in rendered.values["tls"]["secrets"].values() if name}
    external = rendered.values["redis"]["external"]
    there |= {external["secret"]: {external["urlKey"], external["caKey"]}}
    there |= {"mesh-afd-test": {"key"}}  # NOTES.txt tells how to make it
    for workload in rendered.workloads:
        for name, key in secrets_used(workload):
            assert key in there[name]
    assert ("create secret generic mesh-afd-test --from-literal=key=" in rendered.notes) == (
        ("mesh-afd-test", "key") in secrets_used(rendered.of_role("test")[0])
    )


def test_pods_may_do_as_little_as_they_can(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        spec, container = workload.spec, workload.container["securityContext"]
        assert (spec["enableServiceLinks"], spec["automountServiceAccountToken"]) == (False, False)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (user,) = re.findall(r"^USER (\d+):\1$", dockerfile("gateway"), re.MULTILINE)
        asked = {spec["securityContext"].get(name) for name in ("runAsUser", "runAsGroup", "fsGroup")}
        fixed = 999 if workload.role == "redis" else int(user)
        assert asked == {fixed if rendered.values["fixedUsers"] else None}
        assert spec.get("serviceAccountName", "") == rendered.values["serviceAccount"]
        assert (container["allowPrivilegeEscalation"], container["readOnlyRootFilesystem"]) == (False, True)
        has_rdma = rendered.values.get(workload.role, {}).get("rdma", {}).get("count", 0) > 0
        assert container["capabilities"] == {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if has_rdma else {})}


def test_pods_have_the_image_of_their_role_and_the_devices_that_were_asked_for(rendered: Rendered) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for workload in rendered.services:
        values, image = rendered.values[workload.role], rendered.values["image"]
        name = compose["ffn-0" if workload.role == "ffn" else workload.role]["image"].split(":")[1].split("}")[1]
        tag = values["imageTag"] or image["tag"] or "0.1.0"
        assert workload.container["image"] == f"{image['registry']}{name}:{tag}"
        devices = [values[kind] for kind in ("gpu", "rdma") if kind in values and values[kind]["count"]]
        limits = workload.container["resources"]["limits"]
        assert {name: count for name, count in limits.items() if "/" in name} == {
            device["resource"]: device["count"] for device in devices
        }
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == "0.1.0"


def test_pods_run_where_their_values_say_and_tasks_where_gateways_do(rendered: Rendered) -> None:
    names = {"nodeSelector": "nodeSelector", "tolerations": "tolerations", "priorityClassName": "priorityClass"}
    for workload in rendered.workloads:
        values = rendered.values["gateway" if workload.role in TASKS else workload.role]
        for name, value in names.items():
            assert workload.spec.get(name) == (values[value] or None), workload.name


def test_further_volumes_are_those_of_their_role() -> None:
    for workload in case("where the namespace decides").services:
        mounted = {"name": "proxy", "mountPath": "/etc/proxy"} in workload.container["volumeMounts"]
        assert mounted == (workload.role == "gateway")


def test_all_images_have_the_same_user() -> None:
    assert len({re.search(r"^USER .*$", dockerfile(role), re.MULTILINE)[0] for role in ROLES}) == 1  # type: ignore[index]


def test_a_pod_that_stops_has_the_time_to_drain(rendered: Rendered) -> None:
    for workload in rendered.services:
        before_s = 5 if workload.role == "gateway" else 0
        hook = {"preStop": {"exec": {"command": ["sleep", str(before_s)]}}} if before_s else None
        assert workload.container.get("lifecycle") == hook
        assert workload.spec["terminationGracePeriodSeconds"] >= rendered.values["drainSeconds"] + before_s + 5


# --- their environment ---


def environment(rendered: Rendered, workload: Workload) -> dict[str, str]:
    """As the kubelet would make it, in pod `<name>-0`."""
    name = f"{workload.name}-0"
    labels = {**workload.labels, "leaderworkerset.sigs.k8s.io/worker-index": "1"}
    fields = {"status.podIP": "10.1.2.3", "metadata.name": name}
    fields |= {f"metadata.labels['{key}']": value for key, value in labels.items()}
    secrets = {each["metadata"]["name"]: each["stringData"] for each in rendered.of("Secret")}
    external = rendered.values["redis"]["external"]
    secrets[external["secret"]] = {external["urlKey"]: "rediss://user:password@elsewhere:6380/0"}
    found: dict[str, str] = {}
    for variable in workload.container["env"]:
        assert variable["name"] not in found, f"{variable['name']} is there twice"
        match variable.get("valueFrom"):
            case {"fieldRef": {"fieldPath": path}}:
                value = fields[path]
            case {"secretKeyRef": {"name": secret, "key": key}}:
                value = secrets[secret][key]
            case _:
                value = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], variable["value"])
        found[variable["name"]] = value
    return found


def settings_of(rendered: Rendered, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    variables = image_environment(workload.role) | environment(rendered, workload)
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = load_settings(SETTINGS_OF[workload.role])
    refuse_plain_text(settings)
    return settings


def test_every_variable_is_a_setting_of_its_service(rendered: Rendered) -> None:
    for workload in rendered.services:
        names = {name for name in environment(rendered, workload) if name.startswith("AFD_")}
        assert names <= {f"AFD_{name.upper()}" for name in SETTINGS_OF[workload.role].model_fields}


def test_services_start_with_the_settings_that_the_values_say(
    rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rendered.values
    for workload in rendered.services:
        settings = settings_of(rendered, workload, monkeypatch)
        assert settings.replica_id == f"{workload.name}-0"
        assert settings.grpc_address(settings.grpc_port) == "10.1.2.3:50051"
        assert settings.host == values["host"]
        assert settings.mesh == (values["mesh"] or "llm.mesh")
        assert settings.insecure == values["insecure"]
        assert (settings.tls is None) == values["insecure"]
        assert (settings.redis_ca is not None) == bool(values["redis"]["external"]["caKey"])
        assert settings.startup_timeout_s == values["startupSeconds"]
        assert settings.drain_timeout_s == values["drainSeconds"]
        for name, value in (values["settings"] | values[workload.role]["settings"]).items():
            assert getattr(settings, name) == ((0, 2, 3) if name == "cpus" else value), name


def test_each_service_has_its_own_settings(rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rendered.values
    (gateway,) = (settings_of(rendered, each, monkeypatch) for each in rendered.of_role("gateway"))
    named = gateway.served_model_name, gateway.require_api_key, gateway.public_tls is None  # type: ignore[attr-defined]
    assert named == (values["model"]["name"], values["gateway"]["requireApiKey"], values["insecure"])
    compute = [*rendered.of_role("attention"), *rendered.of_role("ffn")]
    for workload in compute:
        settings = settings_of(rendered, workload, monkeypatch)
        found = settings.dtype, settings.device  # type: ignore[attr-defined]
        assert found == (values["model"]["dtype"], "cuda" if values[workload.role]["gpu"]["count"] else "cpu")
    (attention,) = (settings_of(rendered, each, monkeypatch) for each in rendered.of_role("attention"))
    assert attention.ffn_shards == values["ffn"]["shards"]  # type: ignore[attr-defined]


def test_every_shard_of_every_set_is_there_once(rendered: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, found = rendered.values["ffn"], Counter[tuple[int, int]]()
    for workload in rendered.of_role("ffn"):
        shard, num_shards = settings_of(rendered, workload, monkeypatch).shard  # type: ignore[attr-defined]
        if ffn["leaderWorkerSet"]:
            spec = workload.manifest["spec"]
            assert (shard, num_shards) == (1, spec["leaderWorkerTemplate"]["size"]), "the pod of worker index 1"
            assert workload.name == f"mesh-afd-ffn-of-{num_shards}"
            found.update((index, num_shards) for index in range(num_shards))
        else:
            spec = workload.manifest["spec"]
            assert workload.name == f"mesh-afd-ffn-{shard}-of-{num_shards}"
            found[shard, num_shards] += 1
        assert spec["replicas"] == ffn["replicas"]
    wanted = [number for number in (ffn["shards"], ffn["nextShards"]) if number]
    assert found == Counter((shard, number) for number in wanted for shard in range(number))


def test_resharding_restarts_no_attention_replica() -> None:
    before = render({**LEAST, "ffn": {"shards": 2}}).of_role("attention")
    assert render({**LEAST, "ffn": {"shards": 2, "nextShards": 3}}).of_role("attention") == before


# --- who reaches whom ---


def edges(rendered: Rendered) -> set[tuple[str, str, str]]:
    """Caller, called, and port, of all that the policies let through; "*" is anybody, or any port."""
    policies, found = rendered.of("NetworkPolicy"), set()
    for called in rendered.workloads:
        selecting = [each for each in policies if matches(each["spec"]["podSelector"]["matchLabels"], called.labels)]
        if not selecting:
            found.add(("*", called.role, "*"))
        for rule in (rule for each in selecting for rule in each["spec"]["ingress"]):
            ports = [called_port(called, port["port"]) for port in rule.get("ports", [])] or ["*"]
            callers = [name for peer in rule.get("from", []) for name in peers(rendered, peer)]
            callers = callers if "from" in rule else ["*"]
            found |= {(caller, called.role, port) for caller in callers for port in ports}
    return found


def called_port(called: Workload, name: str) -> str:
    assert name in called.ports
    return name


def peers(rendered: Rendered, peer: Object) -> list[str]:
    if "namespaceSelector" in peer:
        return [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]]
    found = [each.role for each in rendered.workloads if matches(peer["podSelector"]["matchLabels"], each.labels)]
    assert found
    return found


def test_the_network_lets_through_what_the_architecture_has(rendered: Rendered) -> None:
    wanted = rendered.values["networkPolicies"]
    expected = {("gateway", "attention", "grpc"), ("attention", "ffn", "grpc")}
    expected |= {("*", task.role, "*") for task in rendered.workloads if task.role in TASKS}
    if not rendered.values["redis"]["external"]["secret"]:
        expected |= {(each.role, "redis", "redis") for each in rendered.workloads if each.role in (*ROLES, "layout")}
    if wanted["nixl"]:
        expected -= {("attention", "ffn", "grpc")}
        expected |= {("attention", "ffn", "*"), ("ffn", "attention", "*")}
    clients = ["ingress", "test"] if wanted["clients"] else ["*"]
    expected |= {(client, "gateway", port) for client in clients for port in ("http", "grpc")}
    if wanted["metrics"]:
        expected |= {("monitoring", role, "metrics") for role in ("attention", "ffn")}
        expected |= {("monitoring", "gateway", "http")}
    if not wanted["enabled"]:
        expected = {("*", role, "*") for role in {each.role for each in rendered.workloads}}
    assert edges(rendered) == expected


def test_a_route_leads_to_both_ports_of_the_gateway() -> None:
    rendered = case("where the namespace decides")
    (route,) = rendered.of("HTTPRoute")
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "ingress"}]
    to_grpc, to_http = route["spec"]["rules"]
    (match,) = to_grpc["matches"]
    assert match["path"]["value"] == f"/{gateway_pb2.DESCRIPTOR.services_by_name['GatewayService'].full_name}"
    (service,) = [each for each in rendered.of("Service") if each["metadata"]["name"] == "mesh-afd-gateway"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    for rule, port in ((to_grpc, "grpc"), (to_http, "http")):
        assert rule["backendRefs"] == [{"name": "mesh-afd-gateway", "port": ports[port]}]
    found = service["spec"]["loadBalancerClass"], service["spec"]["ipFamilyPolicy"]
    assert found == ("a.example/lb", "PreferDualStack")


def test_scaling_says_who_asks_where_prometheus_wants_to_know() -> None:
    (with_one,), (without,) = (case(name).of("ScaledObject") for name in ("where the namespace decides", "mixed-cards"))
    for trigger in with_one["spec"]["triggers"]:
        assert trigger["authenticationRef"] == {"name": "who-asks"}
        assert trigger["metadata"]["authModes"] == "basic"
    assert not any(
        "authenticationRef" in each or "authModes" in each["metadata"] for each in without["spec"]["triggers"]
    )


def test_certificates_are_for_the_names_that_the_services_ask_for(rendered: Rendered) -> None:
    certificates = {
        each["metadata"]["name"].removeprefix("mesh-afd-"): each["spec"] for each in rendered.of("Certificate")
    }
    manager, secrets = rendered.values["tls"]["certManager"], rendered.values["tls"]["secrets"]
    issuer = manager["issuer"]
    made = {role for role in (*ROLES, "public") if issuer and not secrets[role]}
    assert set(certificates) == made
    for role in ROLES if issuer else ():
        assert certificates[role]["dnsNames"] == [name_of(role)]
        assert {"server auth", "client auth"} <= set(certificates[role]["usages"])
        assert certificates[role]["issuerRef"] == issuer
    if "public" in made:
        public = certificates["public"]
        in_cluster = {"mesh-afd-gateway", "mesh-afd-gateways.llm.svc"}
        assert set(manager["publicNames"]) <= set(public["dnsNames"])
        assert in_cluster & set(public["dnsNames"]) == (set() if manager["publicIssuer"] else in_cluster)
        assert "client auth" not in public["usages"]
        assert public["issuerRef"] == (manager["publicIssuer"] or issuer)


def test_a_pod_has_the_certificate_of_its_role_where_its_settings_say(
    rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rendered.values["insecure"]:
        return
    given = rendered.values["tls"]["secrets"]
    for workload in rendered.services:
        settings = settings_of(rendered, workload, monkeypatch)
        volumes = {volume["name"]: volume for volume in workload.spec["volumes"]}
        mounted = {Path(mount["mountPath"]): volumes[mount["name"]] for mount in workload.container["volumeMounts"]}
        shown = {workload.role: settings.tls, "public": getattr(settings, "public_tls", None)}
        for name, folder in shown.items():
            if folder:
                assert mounted[folder]["secret"]["secretName"] == (given[name] or f"mesh-afd-{name}-tls")


def issued(**more: Any) -> Object:
    return {"model": LEAST["model"], "tls": {"certManager": {"issuer": {"name": "inner"}, **more}}}


def test_the_notes_name_the_gateway_as_its_certificate_does(rendered: Rendered) -> None:
    found = re.search(r'(https?)://([^:]+):8000/v1\n.*Client\("([^:]+):50051"(.*)\)\n', rendered.notes)
    assert found
    scheme, url, sdk, trust = found.groups()
    assert scheme == ("http" if rendered.values["insecure"] else "https")
    names = [
        each["spec"]["dnsNames"] for each in rendered.of("Certificate") if each["metadata"]["name"] == "mesh-afd-public"
    ]
    assert all({url, sdk} <= set(each) for each in names)
    given = rendered.values["tls"]
    ca = "" if rendered.values["insecure"] else ', ca="ca.crt"'
    assert trust == (", tls=True" if given["certManager"]["publicIssuer"] else ca)
    secret = given["secrets"]["public"] or "mesh-afd-public-tls"
    assert (f"get secret {secret} -o jsonpath" in rendered.notes) == ("ca.crt" in trust)


def test_the_notes_forward_a_port_only_where_localhost_has_a_certificate() -> None:
    forward = "port-forward svc/mesh-afd-gateway 8000 50051"
    assert forward in case("least").notes
    assert forward in render(issued(publicNames=["localhost"])).notes
    assert forward not in (notes := render(issued()).notes)
    assert "add that to tls.certManager.publicNames" in notes
    assert forward not in case("certificates of both kinds").notes


def test_the_notes_name_what_a_route_is_for() -> None:
    assert "through your Gateway     llm.example.com, with" in case("where the namespace decides").notes
    assert "your Gateway" not in case("least").notes
    parents = {"parents": [{"name": "public"}]}
    assert "through your Gateway     its own names, with" in render(changed(gateway={"route": parents})).notes


# --- Redis ---


def test_its_redis_knows_the_user_that_is_documented(tmp_path: Path) -> None:
    (secret,) = case("everything named").of("Secret")
    assert secret["stringData"]["url"] == "redis://afd:of-mine_1@mesh-afd-redis:6379/0"
    users = {words[1]: words[1:] for words in map(str.split, secret["stringData"]["users.acl"].splitlines())}
    assert set(users) == {"default", "probe", "afd"}
    hashed = next(rule for rule in users["afd"] if rule.startswith("#"))
    assert [">PASSWORD" if rule == hashed else rule for rule in users["afd"]] == acl_rules()
    with one_server(tmp_path) as server:
        for name in ("probe", "afd", "default"):
            server.ask("ACL", "SETUSER", *users[name])
        asyncio.run(use_everything(f"redis://afd:of-mine_1@127.0.0.1:{server.port}/0"))


def test_a_password_that_nobody_gave_is_another_one_each_time() -> None:
    passwords = {render(LEAST).of("Secret")[0]["stringData"]["password"] for _ in range(3)}
    assert len(passwords) == 3
    assert all(len(password) == 32 for password in passwords)


def install(values: Object, kubeconfig: Path) -> str:
    """What Helm would send to this cluster; raises what it refuses."""
    with helm_python.Config(namespace="llm", kubeconfig_path=str(kubeconfig), storage_driver="memory") as helm:
        kinds = {"networkPolicies": {"enabled": False}, "podDisruptionBudgets": {"enabled": False}}  # not in the fake
        return str(helm.install(str(CHART), "mesh", {**values, **kinds}, dry_run="server")["manifest"])


def test_an_upgrade_keeps_the_password_of_redis(tmp_path: Path) -> None:
    with fake_cluster(tmp_path) as cluster:
        cluster.add_secret("mesh-afd-redis", password="of-before")
        assert "redis://afd:of-before@mesh-afd-redis:6379/0" in install(LEAST, cluster.kubeconfig)
        given = {**LEAST, "redis": {"password": "another-1"}}
        assert "redis://afd:another-1@mesh-afd-redis:6379/0" in install(given, cluster.kubeconfig)


def test_scaling_begins_with_the_pods_that_run(tmp_path: Path) -> None:
    scaling = {"enabled": True, "minReplicas": 3}
    values = {
        **LEAST,
        "gateway": {"replicas": 1, "autoscaling": scaling},
        "attention": {"autoscaling": scaling | {"prometheus": "http://prometheus:9090"}},
    }
    with fake_cluster(tmp_path) as cluster:
        cluster.add("Deployment", "mesh-afd-gateway", spec={"replicas": 5})
        cluster.add("StatefulSet", "mesh-afd-attention", spec={"replicas": 7})
        objects = list(yaml.safe_load_all(install(values, cluster.kubeconfig)))
    found = {each["metadata"]["name"]: each["spec"]["replicas"] for each in objects if each["kind"] in WORKLOADS[:2]}
    assert (found["mesh-afd-gateway"], found["mesh-afd-attention"]) == (5, 7)


def test_its_redis_is_full_before_its_memory_is(rendered: Rendered) -> None:
    sizes = {"mb": 10**6 * 1.048576, "gb": 2**30, "Mi": 2**20, "Gi": 2**30}
    for workload in rendered.of_role("redis"):
        arguments = workload.container["args"]
        texts = arguments[arguments.index("--maxmemory") + 1], workload.container["resources"]["limits"]["memory"]
        most, limit = (float(text[:-2]) * sizes[text[-2:]] for text in texts)
        assert most < 0.8 * limit


def test_shards_of_a_mesh_that_serves_are_not_replaced_at_once(tmp_path: Path) -> None:
    three = {**LEAST, "ffn": {"shards": 3}}
    with fake_cluster(tmp_path) as cluster:
        install(three, cluster.kubeconfig)
        cluster.add("StatefulSet", "mesh-afd-ffn-0-of-2")
        install({**LEAST, "ffn": {"shards": 2}}, cluster.kubeconfig)
        install({**LEAST, "ffn": {"shards": 2, "nextShards": 3}}, cluster.kubeconfig)
        sentence = "there is no mesh-afd-ffn-0-of-3, and the mesh has mesh-afd-ffn-0-of-2: keep ffn.shards"
        with pytest.raises(helm_python.HelmError, match=sentence):
            install(three, cluster.kubeconfig)
        with pytest.raises(helm_python.HelmError, match="there is no mesh-afd-ffn-of-2, and the mesh has"):
            install({**LEAST, "ffn": {"shards": 2, "leaderWorkerSet": True}}, cluster.kubeconfig)
        cluster.add("StatefulSet", "mesh-afd-ffn-0-of-3")
        install(three, cluster.kubeconfig)


def test_groups_of_shards_of_a_mesh_that_serves_are_not_replaced_at_once(tmp_path: Path) -> None:
    groups = {**LEAST, "ffn": {"shards": 2, "leaderWorkerSet": True}}
    with fake_cluster(tmp_path) as cluster:
        cluster.add("LeaderWorkerSet", "mesh-afd-ffn-of-2")
        install(groups, cluster.kubeconfig)
        for values in ({"shards": 3, "leaderWorkerSet": True}, {"shards": 2}):
            with pytest.raises(helm_python.HelmError, match="and the mesh has mesh-afd-ffn-of-2: keep"):
                install({**LEAST, "ffn": values}, cluster.kubeconfig)


def test_shards_that_serve_are_looked_for_before_an_upgrade_and_a_rollback(rendered: Rendered) -> None:
    jobs, ffn = rendered.of_role("layout"), rendered.values["ffn"]
    assert len(jobs) == ffn["checkLayout"]
    for job in jobs:
        annotations = job.manifest["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-upgrade,pre-rollback"
        assert job.manifest["spec"]["backoffLimit"] == 0, "it would be refused once more"
        assert job.manifest["spec"]["activeDeadlineSeconds"] < 300, "as long as Helm waits"
        shell, option, ask = job.container["command"]
        assert (shell, option) == ("sh", "-c")
        _, command = ask.split(" exec afd layout ")
        layout = typer.main.get_command(app).commands["layout"]  # type: ignore[attr-defined]
        wanted = layout.make_context("layout", [*command.split(), "--redis", "redis://r"]).params["require"]
        assert wanted == [number for number in (ffn["shards"], ffn["nextShards"]) if number]
        (url, mesh, *_) = job.container["env"]
        service = {each["name"]: each for each in rendered.services[0].container["env"]}
        assert mesh == service["AFD_MESH"]
        reference = url["valueFrom"]["secretKeyRef"]
        assert reference == {**service["AFD_REDIS"]["valueFrom"]["secretKeyRef"], "optional": True}


def test_an_installation_that_stopped_half_way_is_finished_by_an_upgrade(tmp_path: Path) -> None:
    with fake_cluster(tmp_path) as cluster:
        cluster.add("StatefulSet", "mesh-afd-attention")
        cluster.add("StatefulSet", "mesh-afd-ffn-1-of-2")
        cluster.add("StatefulSet", "other-afd-ffn-0-of-3")  # of another release
        install({**LEAST, "ffn": {"shards": 2}}, cluster.kubeconfig)


# --- what is wrong is a sentence ---


def changed(**values: Any) -> Object:
    return {**LEAST, **values}


def helm_install(values: Object) -> None:
    """Without a cluster; `render` goes by what the chart has where a value is null."""
    with helm_python.Config(namespace="llm", kubeconfig_path="/nonexistent", storage_driver="memory") as helm:
        helm.install(str(CHART), "mesh", values, dry_run="client")


REFUSED: dict[str, tuple[Object, str]] = {
    "a wrong key": (changed(gatway={}), "additional properties 'gatway' not allowed"),
    "a wrong key further down": (
        changed(gateway={"autoscaling": {"on": True}}),
        "at '/gateway/autoscaling': additional properties 'on' not allowed",
    ),
    "a wrong setting": (
        changed(attention={"settings": {"kv_cache_gb": 1}}),
        "at '/attention/settings': additional properties 'kv_cache_gb' not allowed",
    ),
    "a setting of another service": (changed(ffn={"settings": {"block_size": 8}}), "'block_size' not allowed"),
    "a setting that is not of all": (changed(settings={"threads": 8}), "'threads' not allowed"),
    "a setting that the chart decides": (changed(ffn={"settings": {"shard": "0/2"}}), "'shard' not allowed"),
    "a value of another type": (changed(insecure="yes"), "at '/insecure': got string, want boolean"),
    "a setting of another type": (
        changed(gateway={"settings": {"max_requests": "many"}}),
        "at '/gateway/settings/max_requests': got string, want integer",
    ),
    "AFD_* beside the settings": (
        changed(ffn={"extraEnv": [{"name": "AFD_SHARD"}]}),
        "ffn.extraEnv has AFD_SHARD: AFD_*",
    ),
    "an address of its own": (
        changed(gateway={"extraEnv": [{"name": "POD_IP"}]}),
        "gateway.extraEnv has POD_IP: AFD_*",
    ),
    "an index of its own": (
        changed(attention={"extraEnv": [{"name": "WORKER_INDEX"}]}),
        "attention.extraEnv has WORKER_INDEX: AFD_*",
    ),
    "a variable twice": (
        changed(ffn={"extraEnv": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}),
        "ffn.extraEnv has A twice: a variable has one value",
    ),
    "a variable that the chart sets": (
        changed(telemetry={"otlpEndpoint": "http://c:4317"}, ffn={"extraEnv": [{"name": "OTEL_RESOURCE_ATTRIBUTES"}]}),
        "ffn.extraEnv has OTEL_RESOURCE_ATTRIBUTES, which telemetry.otlpEndpoint sets: leave one of them out",
    ),
    "a variable that is no text": (
        changed(ffn={"extraEnv": [{"name": "A", "value": 1}]}),
        "at '/ffn/extraEnv/0/value': got number, want string",
    ),
    "a variable with a wrong key": (
        changed(ffn={"extraEnv": [{"name": "A", "valeu": "1"}]}),
        "at '/ffn/extraEnv/0': additional properties 'valeu' not allowed",
    ),
    "a variable of two sources": (
        changed(ffn={"extraEnv": [{"name": "A", "value": "", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]}),
        "ffn.extraEnv has A with value and valueFrom: leave one of them out",
    ),
    "a variable of an unknown source": (
        changed(ffn={"extraEnv": [{"name": "A", "valueFrom": {"secret": {}}}]}),
        "at '/ffn/extraEnv/0/valueFrom': additional properties 'secret' not allowed",
    ),
    "a variable that no program could read": (
        changed(ffn={"extraEnv": [{"name": "A B"}]}),
        "at '/ffn/extraEnv/0/name'",
    ),
    "a volume of nothing": (
        changed(ffn={"extraVolumes": [{"name": "x"}]}),
        "at '/ffn/extraVolumes/0': minProperties: got 1, want 2",
    ),
    "a volume of an unknown type": (
        changed(ffn={"extraVolumes": [{"name": "x", "empty": {}}]}),
        "at '/ffn/extraVolumes/0': additional properties 'empty' not allowed",
    ),
    "a mount with a wrong key": (
        changed(ffn={"extraVolumeMounts": [{"name": "tmp", "mountPath": "/x", "readonly": True}]}),
        "additional properties 'readonly' not allowed",
    ),
    "a mount over another one by another name": (
        changed(ffn={"extraVolumeMounts": [{"name": "tmp", "mountPath": "//model"}]}),
        "ffn.extraVolumeMounts has //model, where something is mounted already",
    ),
    "an affinity to what there is not": (
        changed(ffn={"affinity": {"nodeAfinity": {}}}),
        "at '/ffn/affinity': additional properties 'nodeAfinity' not allowed",
    ),
    "a toleration with a wrong key": (
        changed(redis={"tolerations": [{"keys": "a"}]}),
        "at '/redis/tolerations/0': additional properties 'keys' not allowed",
    ),
    "clients with a wrong key": (
        changed(networkPolicies={"clients": [{"namespace": "a"}]}),
        "at '/networkPolicies/clients/0': additional properties 'namespace' not allowed",
    ),
    "a label with no name": (changed(ffn={"podLabels": {"a b": "c"}}), "invalid propertyName 'a b'"),
    "GPUs twice": (
        changed(ffn={"gpu": {"count": 1}, "resources": {"limits": {"nvidia.com/gpu": 1}}}),
        "ffn.resources.limits has nvidia.com/gpu, which ffn.gpu.count sets: leave it out of the limits",
    ),
    "scaling by a share of nothing": (
        changed(gateway={"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}),
        "gateway.autoscaling goes by a share of the requested CPU: set gateway.resources.requests.cpu",
    ),
    "a volume that is there": (
        changed(ffn={"extraVolumes": [{"name": "shm", "emptyDir": {}}]}),
        "ffn.extraVolumes has shm, which is there already: give it another name",
    ),
    "a mount of no volume": (
        changed(ffn={"extraVolumeMounts": [{"name": "x", "mountPath": "/x"}]}),
        "ffn.extraVolumeMounts has x, and no volume is called so: add it to ffn.extraVolumes",
    ),
    "a mount over another one": (
        changed(ffn={"extraVolumeMounts": [{"name": "tmp", "mountPath": "/model"}]}),
        "ffn.extraVolumeMounts has /model, where something is mounted already: choose another place",
    ),
    "a mount at no place": (
        changed(ffn={"extraVolumeMounts": [{"name": "tmp", "mountPath": "x"}]}),
        "at '/ffn/extraVolumeMounts/0/mountPath'",
    ),
    "a variable without a name": (changed(ffn={"extraEnv": [{"value": "1"}]}), "at '/ffn/extraEnv/0'"),
    "memory of no size": (
        changed(ffn={"resources": {"limits": {"memory": "8GB"}}}),
        "at '/ffn/resources/limits/memory'",
    ),
    "storage of no size": (changed(redis={"storage": "much"}), "at '/redis/storage'"),
    "shared memory of no size": (changed(sharedMemory={"size": ""}), "at '/sharedMemory/size'"),
    "a model at no place": (changed(model={"name": "m", "hostPath": "models"}), "at '/model/hostPath'"),
    "a model outside": (changed(model={**LEAST["model"], "subPath": "a/../../b"}), "at '/model/subPath'"),
    "a tag that is none": (changed(image={"tag": "a b"}), "at '/image/tag'"),
    "a tag with its image": (changed(ffn={"imageTag": "afd-ffn:1"}), "at '/ffn/imageTag'"),
    "a registry without a slash": (changed(image={"registry": "ghcr.io/you"}), "at '/image/registry'"),
    "a label that the chart sets": (
        changed(monitoring={"labels": {"helm.sh/chart": "x"}}),
        "invalid propertyName 'helm.sh/chart'",
    ),
    "a label that is none": (changed(monitoring={"labels": {"a": "b c"}}), "at '/monitoring/labels/a'"),
    "a name that is none": (changed(serviceAccount="My_Account"), "at '/serviceAccount'"),
    "an address of one pod": (changed(host="10.1.2.3"), "at '/host'"),
    "a route to nowhere": (changed(gateway={"route": {"parents": [{}]}}), "at '/gateway/route/parents/0'"),
    "an issuer without names": (
        changed(insecure=False, tls={"certManager": {"issuer": {"name": "a"}, "publicIssuer": {"name": "b"}}}),
        "tls.certManager.publicIssuer is set and publicNames is not",
    ),
    "what clients see twice": (
        changed(
            insecure=False,
            tls={
                "certManager": {"issuer": {"name": "a"}, "publicIssuer": {"name": "b"}, "publicNames": ["c"]},
                "secrets": {"public": "d"},
            },
        ),
        "tls.certManager.publicIssuer and tls.secrets.public are both set",
    ),
    "what clients see alone": (
        changed(insecure=False, tls={"secrets": {"public": "d"}}),
        "nothing says where certificates come from",
    ),
    "what clients see in plain text": (changed(tls={"secrets": {"public": "d"}}), "insecure is true, and tls says"),
    "a label that selectors go by": (
        changed(ffn={"podLabels": {"app.kubernetes.io/component": "x"}}),
        "invalid propertyName 'app.kubernetes.io/component'",
    ),
    "two GPUs for a process": (changed(ffn={"gpu": {"count": 2}}), "at '/ffn/gpu/count': maximum: got 2, want 1"),
    "no gateway": (changed(gateway={"replicas": 0}), "gateway.replicas is 0, and a mesh needs at least one"),
    "no attention": (changed(attention={"replicas": 0}), "attention.replicas is 0, and a mesh needs at least one"),
    "no FFN": (changed(ffn={"replicas": 0}), "ffn.replicas is 0, and a mesh needs at least one"),
    "no shards": (changed(ffn={"shards": 0}), "ffn.shards is 0, and a mesh needs at least one"),
    "fewer than no replicas": (changed(ffn={"replicas": -1}), "minimum: got -1, want 0"),
    "the same shards next": (changed(ffn={"shards": 2, "nextShards": 2}), "ffn.nextShards equals ffn.shards"),
    "bounds the wrong way round": (
        changed(gateway={"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}}),
        "gateway.autoscaling.minReplicas is 3 and maxReplicas is 2: lower the first or raise the second",
    ),
    "scaling by nothing": (changed(attention={"autoscaling": {"enabled": True}}), "autoscaling.prometheus must be"),
    "a model without a name": (changed(model={"hostPath": "/m"}), "model.name is not set"),
    "no model": (changed(model={"name": "m"}), "nothing says where the model is"),
    "two models": (changed(model={"name": "m", "hostPath": "/m", "persistentVolumeClaim": "c"}), "both set"),
    "no certificates": (changed(insecure=False), "nothing says where certificates come from: set"),
    "certificates twice": (
        changed(insecure=False, tls={"certManager": {"issuer": {"name": "ca"}}, "secrets": NAMES}),
        "tls.certManager.issuer and tls.secrets are both set",
    ),
    "certificates for nothing": (changed(tls={"secrets": NAMES}), "insecure is true, and tls says"),
    "a certificate that is missing": (
        changed(insecure=False, tls={"secrets": {**NAMES, "ffn": ""}}),
        "tls.secrets.ffn is not set: every role has a certificate of its own",
    ),
    "certificates that are missing": (
        changed(insecure=False, tls={"secrets": {"gateway": "a", "public": "d"}}),
        "tls.secrets.attention, tls.secrets.ffn are not set: every role",
    ),
    "a public issuer in plain text": (
        changed(tls={"certManager": {"publicIssuer": {"name": "b"}}}),
        "insecure is true, and tls says where certificates come from: choose one",
    ),
    "a kind of issuer without a name": (
        changed(insecure=False, tls={"certManager": {"issuer": {"kind": "Issuer"}}}),
        "properties 'name' required, if 'kind' exists",
    ),
    "a CA of no Redis": (changed(redis={"external": {"caKey": "ca.crt"}}), "redis.external.secret is not"),
    "a key of no Redis": (
        changed(redis={"external": {"urlKey": "u"}}),
        "urlKey is set and redis.external.secret is not",
    ),
    "no key of a Redis": (changed(redis={"external": {"secret": "s", "urlKey": ""}}), "redis.external.urlKey is empty"),
    "a password that a URL would take apart": (changed(redis={"password": "a?b/c@d:e"}), "redis.password must have 8"),
    "memory that is no number": (changed(redis={"maxMemory": "much"}), "at '/redis/maxMemory'"),
    "a mesh that Redis cannot name": (changed(mesh="a b"), "at '/mesh'"),
    "metrics that nobody may read": (
        changed(monitoring={"podMonitor": True}),
        "monitoring.podMonitor needs metrics that nobody may read: networkPolicies.metrics must say",
    ),
    "scaling by metrics that nobody may read": (
        changed(attention={"autoscaling": {"enabled": True, "prometheus": "http://prometheus:9090"}}),
        "attention.autoscaling.enabled needs metrics that nobody may read",
    ),
    "scaling to no gateway": (changed(gateway={"autoscaling": {"minReplicas": 0}}), "minimum: got 0, want 1"),
    "scaling to at most none": (changed(attention={"autoscaling": {"maxReplicas": 0}}), "minimum: got 0, want 1"),
    "scaling where none waits": (
        changed(attention={"autoscaling": {"waitingPerReplica": 0}}),
        "minimum: got 0, want 1",
    ),
    "a Prometheus without a scheme": (
        changed(attention={"autoscaling": {"prometheus": "prometheus:9090"}}),
        "at '/attention/autoscaling/prometheus'",
    ),
    "more shards than names are for": (changed(ffn={"shards": 257}), "maximum: got 257, want 256"),
    "more next shards than names are for": (changed(ffn={"nextShards": 257}), "maximum: got 257, want 256"),
    "replicas without end": (changed(attention={"replicas": 10_001}), "maximum: got 10,001, want 10,000"),
    "no microbatches": (changed(attention={"settings": {"microbatches": 0}}), "minimum: got 0, want 1"),
    "microbatches without end": (changed(attention={"settings": {"microbatches": 65}}), "maximum: got 65, want 64"),
}


@pytest.mark.parametrize(("values", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_in_words(values: Object, sentence: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(sentence)):
        helm_install(values)


@pytest.mark.parametrize("name", ["1mesh", "a.b"])
def test_a_release_that_no_service_can_be_named_after_is_refused(name: str) -> None:
    with pytest.raises(helm_python.HelmError, match=f"the release is called {name}: names of Services are made of it"):
        render(LEAST, name=name)


def test_a_password_that_is_refused_is_not_shown() -> None:
    with pytest.raises(helm_python.HelmError, match=r"redis\.password must have 8") as refused:
        render(changed(redis={"password": "hunter2?"}))
    assert "hunter2" not in str(refused.value)


def test_a_value_that_is_null_is_refused_and_turns_nothing_off() -> None:
    def nulls(values: Object) -> Iterator[tuple[str, Object]]:
        """Each key, and values where only that one is null."""
        for key, value in values.items():
            yield key, {key: None}
            if isinstance(value, dict) and key not in ("requests", "limits"):
                yield from ((name, {key: inner}) for name, inner in nulls(value))

    found = list(nulls(yaml.safe_load((CHART / "values.yaml").read_text())))
    assert len(found) > 100
    for name, values in found:
        with pytest.raises(helm_python.HelmError, match=f"missing propert.*'{name}'"):
            helm_install(values)


def test_microbatches_are_as_many_as_the_service_takes() -> None:
    found = generate.schema()["definitions"]["attention"]["properties"]["microbatches"]["anyOf"]
    numbers, word = found
    for number in (numbers["minimum"], numbers["maximum"], word["const"]):
        parse_microbatches(number)
    for number in (numbers["minimum"] - 1, numbers["maximum"] + 1):
        with pytest.raises(ValueError, match="give a number from"):
            parse_microbatches(number)


def test_names_that_yaml_would_take_for_something_else_stay_texts() -> None:
    names = dict.fromkeys(NAMES, "0123")
    rendered = render(
        {
            "image": {"pullSecrets": ["no"]},
            "model": {"name": "m", "persistentVolumeClaim": "0123"},
            "tls": {"secrets": names},
            "redis": {"external": {"secret": "0123", "urlKey": "1", "caKey": "2"}},
            "attention": {"runtimeClass": "1e3"},
            "rail": {"topologyKey": "yes"},
        }
    )
    for workload in rendered.workloads:
        kubernetes_validate.validate(workload.manifest, KUBERNETES, strict=True)


def test_helm_finds_nothing_to_complain_of() -> None:
    found = helm_python.lint(str(CHART), LEAST)
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


# --- what is beside the mesh ---


def test_metrics_are_scraped_from_ports_that_are_there() -> None:
    rendered = case("paper-2a2f")
    (monitor,) = rendered.of("PodMonitor")
    selector = monitor["spec"]["selector"]
    (expression,) = selector["matchExpressions"]
    assert set(expression["values"]) == set(ROLES)
    assert all(matches(selector["matchLabels"], workload.labels) for workload in rendered.services)
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert all(len(ports & workload.ports.keys()) == 1 for workload in rendered.services)
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_metrics_have_the_name_of_the_mesh_that_the_services_have_joined(rendered: Rendered) -> None:
    (mesh,) = {environment(rendered, workload)["AFD_MESH"] for workload in rendered.services}
    for monitor in rendered.of("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["relabelings"] == [{"targetLabel": "mesh", "replacement": mesh}]


def test_it_scales_by_metrics_that_are_documented() -> None:
    (scaled,) = case("mixed-cards").of("ScaledObject")
    documented = set(re.findall(r"`(afd_\w+)", (ROOT / "docs" / "metrics.md").read_text()))
    documented |= set(re.findall(r", `(afd_\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for trigger in scaled["spec"]["triggers"]:
        used = set(re.findall(r"afd_\w+", trigger["metadata"]["query"]))
        assert used
        assert used <= documented
        assert 'namespace="llm",pod=~"mesh-afd-attention-[0-9]+"' in trigger["metadata"]["query"]


def test_dashboards_and_alerts_reach_the_cluster_as_they_are(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "afd", ignore=shutil.ignore_patterns("dashboards", "alerts.yaml"))
    monitoring = {"podMonitor": True, "rules": True, "dashboards": True}
    metrics = {"metrics": [{"namespaceSelector": {}}]}
    values = changed(monitoring=monitoring, networkPolicies=metrics)
    without = render(values, chart)
    assert not without.of("ConfigMap", "PrometheusRule")
    dashboard = {"title": "Overview", "panels": [{"legendFormat": "{{instance}}"}]}
    rules = {"groups": [{"name": "afd", "rules": [{"alert": "A", "expr": "up", "annotations": {"s": "{{ $value }}"}}]}]}
    (chart / "dashboards").mkdir()
    (chart / "dashboards" / "overview.json").write_text(json.dumps(dashboard, indent=2))
    (chart / "alerts.yaml").write_text(yaml.safe_dump(rules))
    rendered = render(values, chart)
    ((name, text),) = rendered.of("ConfigMap")[0]["data"].items()
    assert (name, json.loads(text)) == ("overview.json", dashboard)
    assert rendered.of("ConfigMap")[0]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert rendered.of("PrometheusRule")[0]["spec"] == rules


def test_the_dashboards_and_alerts_that_are_here_are_rendered() -> None:
    rendered = case("paper-2a2f")
    assert len(rendered.of("ConfigMap")) == len(list(CHART.glob("dashboards/*.json")))
    assert len(rendered.of("PrometheusRule")) == (CHART / "alerts.yaml").exists()


def test_helm_test_asks_the_gateway_by_a_command_that_there_is(rendered: Rendered) -> None:
    (test,) = rendered.of_role("test")
    program, name, *arguments = test.container["command"]
    assert program == "afd"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, arguments).params
    service, port = given["target"].split(":")
    ports = {each["metadata"]["name"]: each["spec"]["ports"] for each in rendered.of("Service")}
    manager = rendered.values["tls"]["certManager"]
    ports |= dict.fromkeys(manager["publicNames"], ports["mesh-afd-gateway"])
    assert int(port) in [each["port"] for each in ports[service]]
    variables = {variable["name"] for variable in test.container.get("env", [])}
    assert bool(given["tls"]) == bool(manager["publicIssuer"]), "everybody knows its CA"
    assert ("AFD_CA" in variables) == (not rendered.values["insecure"] and not given["tls"])
    assert ("AFD_API_KEY" in variables) == rendered.values["gateway"]["requireApiKey"]
    assert test.manifest["metadata"]["annotations"]["helm.sh/hook"] == "test"


# --- the files agree ---

# The names that only one of compose.yaml and the chart sets, and why.
ONLY_CHART = {
    "AFD_REPLICA_ID": "a pod's name is known to people; a container's is its host's",
    "AFD_HOST": "pods may have IPv6 alone; compose takes the image's",
    "AFD_ADVERTISE_HOST": "pods have no names in DNS that others could use from the start",
    "AFD_STARTUP_TIMEOUT_S": "probes must wait as long",
    "AFD_DRAIN_TIMEOUT_S": "the grace period must be longer",
    "AFD_DEVICE": "GPUs are values",
}
ONLY_COMPOSE = {
    "AFD_LOG_LEVEL": "settings.log_level",
    "AFD_TRACE_SAMPLE": "settings.trace_sample",
    "AFD_THREADS": "attention.settings.threads",
    "AFD_HANDOFF": "attention.settings.handoff",
    "AFD_MICROBATCHES": "attention.settings.microbatches",
}


def compose_service(role: str) -> Object:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return dict(services["ffn-1" if role == "ffn" else role])


def test_compose_and_the_chart_set_the_same_settings() -> None:
    only_chart, only_compose = set[str](), set[str]()
    for workload in case("least").services:
        compose = {name for name in compose_service(workload.role)["environment"] if name.startswith("AFD_")}
        chart = {name for name in environment(case("least"), workload) if name.startswith("AFD_")}
        only_chart |= chart - compose
        only_compose |= compose - chart
    assert only_chart == ONLY_CHART.keys()
    assert only_compose == ONLY_COMPOSE.keys()


@pytest.mark.parametrize("path", ONLY_COMPOSE.values())
def test_what_only_compose_sets_is_a_value_of_the_chart(path: str) -> None:
    *parents, name = path.split(".")
    properties = generate.schema()["definitions"][parents[0] if len(parents) > 1 else "all"]["properties"]
    assert name in properties


def mounted_at(volume: str | Object) -> str:
    return volume.partition(":")[2] if isinstance(volume, str) else str(volume["target"])


def test_compose_and_the_chart_have_the_same_ports_and_places() -> None:
    published = {str(port).rpartition(":")[2] for port in compose_service("gateway")["ports"]}
    (gateway,) = [each for each in case("least").of("Service") if each["metadata"]["name"] == "mesh-afd-gateway"]
    assert published == {str(port["port"]) for port in gateway["spec"]["ports"]}
    for role in ROLES:
        mounts = {mount["mountPath"] for mount in case("least").of_role(role)[0].container["volumeMounts"]}
        volumes = {mounted_at(volume) for volume in compose_service(role)["volumes"]}
        assert mounts == volumes | {compose_service(role)["tmpfs"][0].partition(":")[0]}


def test_compose_and_the_chart_have_the_same_redis() -> None:
    compose = compose_service("redis")
    (redis,) = case("everything named").of_role("redis")
    assert compose["image"] == f"${{REDIS_IMAGE:-{redis.container['image']}}}"
    assert compose["user"] == "{runAsUser}:{runAsGroup}".format_map(redis.spec["securityContext"])
    first_user = compose["command"].index("--user")
    max_memory = case("everything named").values["redis"]["maxMemory"]
    options = [word.replace("${REDIS_MAXMEMORY:-1gb}", max_memory) for word in compose["command"][:first_user]]
    assert redis.container["args"] == [*options, "--aclfile", "/etc/redis/users.acl"]
    users = " ".join(compose["command"][first_user:]).split("--user ")[1:]
    in_compose = {name: rules for name, *rules in (user.split() for user in users)}
    (secret,) = case("everything named").of("Secret")
    lines = [line.split() for line in secret["stringData"]["users.acl"].splitlines()]
    in_chart = {name: rules for _, name, *rules in lines}
    assert {name: set(rules) for name, rules in in_compose.items() if name != "afd"} == {
        name: set(rules) for name, rules in in_chart.items() if name != "afd"
    }
    password = re.compile("^[>#].*")
    rights = [{password.sub("password", rule) for rule in users["afd"]} for users in (in_compose, in_chart)]
    assert rights[0] == rights[1] - {"resetkeys"}  # of a user that is new there is nothing to reset


def test_the_schema_and_the_table_are_those_of_the_values_and_the_settings() -> None:
    assert json.loads((CHART / "values.schema.json").read_text()) == generate.schema(), "python -m k8s.generate"
    readme = (CHART / "README.md").read_text()
    assert generate.with_table(readme, (CHART / "values.yaml").read_text()) == readme, "python -m k8s.generate"


def test_the_table_has_every_value() -> None:
    def leaves(values: Object, path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            whole = isinstance(value, dict) and value and path.rpartition(".")[2] != "resources."
            if whole and key not in ("requests", "limits"):
                yield from leaves(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    text = (CHART / "values.yaml").read_text()
    rows = {path: yaml.safe_load(default) for path, default, _ in generate.rows_of(text)}
    assert rows == dict(leaves(yaml.safe_load(text)))
    assert all(comment for *_, comment in generate.rows_of(text))


def test_every_setting_is_a_value_or_decided_by_the_chart() -> None:
    settings = {name for kind in SETTINGS_OF.values() for name in kind.model_fields}
    assert settings >= generate.DECIDED
    allowed = {name for each in generate.schema()["definitions"].values() for name in each["properties"]}
    assert allowed == settings - generate.DECIDED


def test_every_command_of_the_readme_says_the_namespace_and_every_upgrade_keeps_the_values() -> None:
    text = (CHART / "README.md").read_text().replace("\\\n", "")
    names = "install|upgrade|uninstall|rollback|test"
    commands = re.findall(rf"\bhelm (?:{names}) mesh[^`\n]*|\bkubectl [^`\n]+", text)
    commands += re.findall(rf"helm (?:{names}) mesh.*", (CHART / "examples" / "laptop.yaml").read_text())
    assert len(commands) > 10
    assert all("--namespace llm" in command for command in commands)
    upgrades = [command for command in commands if command.startswith("helm upgrade")]
    assert upgrades
    assert all("--reset-then-reuse-values" in command for command in upgrades)


def test_the_documentation_names_values_and_files_that_there_are() -> None:
    paths = {path for path, *_ in generate.rows_of((CHART / "values.yaml").read_text())}
    known = paths | {path.rpartition(".")[0] for path in paths} | {"tls.certManager.issuer.name"}
    named = re.compile(r"(?:--set |`|,)((?:gateway|attention|ffn|tls|redis|model|rail|image|monitoring)\.[\w.]+)")
    for file in (CHART / "README.md", ROOT / "docs" / "kubernetes.md", CHART / "templates" / "NOTES.txt"):
        text = file.read_text()
        for name in named.findall(text):
            role, _, setting = name.partition(".settings.")
            assert name in known or setting in SETTINGS_OF[role].model_fields, name
        for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
            assert (file.parent / link).exists(), link
