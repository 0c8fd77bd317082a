"""A stack of containers for all tests here, and the oracle of the model that it serves."""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest
from docker.errors import DockerException

from afd.model.checkpoint import Checkpoint
from afd.model.transformer import Transformer
from afd.model.weights import load_all
from tests.conftest import Model
from tests.e2e.stack import ROOT, Stack, image


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """Builds what the stacks run; the variables that say so."""
    try:
        engine = docker.from_env()
        engine.ping()
    except DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    variables = {"REDIS_IMAGE": image(engine, "redis:8.2")}
    Stack(variables=variables).build()
    return variables


@pytest.fixture(scope="module")
def stack(images: dict[str, str]) -> Iterator[Stack]:
    with Stack(variables=images).running() as stack:
        yield stack


@pytest.fixture(scope="session")
def nano() -> Model:
    path = ROOT / "models" / "step3-nano"
    checkpoint = Checkpoint(path)
    return Model(path, Transformer(checkpoint.config, load_all(checkpoint)))
