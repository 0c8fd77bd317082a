"""As much of a Kubernetes API as Helm looks at before it installs: kinds, and objects that are there."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_KINDS = {
    "/api/v1": {"Secret": "secrets", "Service": "services"},
    "/apis/apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "/apis/autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "/apis/keda.sh/v1alpha1": {"ScaledObject": "scaledobjects"},
    "/apis/leaderworkerset.x-k8s.io/v1": {"LeaderWorkerSet": "leaderworkersets"},
}


def _group(path: str) -> dict[str, Any]:
    _, _, name, number = path.split("/")
    version = {"groupVersion": f"{name}/{number}", "version": number}
    return {"name": name, "versions": [version], "preferredVersion": version}


_ANSWERS: dict[str, Any] = {
    "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "groups": [_group(path) for path in _KINDS if path != "/api/v1"]},
}


class FakeCluster:
    """`add` puts objects there, as Helm's release `mesh` in namespace `llm` has made them."""

    def __init__(self, directory: Path) -> None:
        self.kubeconfig = directory / "kubeconfig"
        self.answers = _ANSWERS | {path: _resources(path) for path in _KINDS}
        for path, kinds in _KINDS.items():
            for kind, plural in kinds.items():
                self.answers[f"{path}/namespaces/llm/{plural}"] = {"kind": f"{kind}List", "items": []}

    def add(self, kind: str, name: str, **fields: Any) -> None:
        path, plural = next((path, kinds[kind]) for path, kinds in _KINDS.items() if kind in kinds)
        metadata = {
            "name": name,
            "namespace": "llm",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "mesh", "meta.helm.sh/release-namespace": "llm"},
        }
        api = path.removeprefix("/apis/").removeprefix("/api/")
        added = {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}
        self.answers[f"{path}/namespaces/llm/{plural}/{name}"] = added
        self.answers[f"{path}/namespaces/llm/{plural}"]["items"].append(added)

    def add_secret(self, name: str, **texts: str) -> None:
        self.add("Secret", name, data={key: base64.b64encode(text.encode()).decode() for key, text in texts.items()})


def _resources(path: str) -> dict[str, Any]:
    verbs = ["get", "list", "create", "patch", "delete"]
    resources = [{"name": plural, "kind": kind, "namespaced": True, "verbs": verbs}
                 for kind, plural in _KINDS[path].items()]  # fmt: skip
    api = path.removeprefix("/apis/").removeprefix("/api/")
    return {"kind": "APIResourceList", "groupVersion": api, "resources": resources}


@contextlib.contextmanager
def fake_cluster(directory: Path) -> Iterator[FakeCluster]:
    cluster = FakeCluster(directory)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/openapi/v2":  # a description of nothing, in protobuf: Helm holds objects against it
                self.answer(200, b"", "application/octet-stream")
            elif path in cluster.answers:
                self.answer(200, json.dumps(cluster.answers[path]).encode())
            else:
                status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
                self.answer(404, json.dumps(status).encode())

        def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "fake", "user": {}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
    }
    cluster.kubeconfig.write_text(json.dumps(config))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
