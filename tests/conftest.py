"""What several tests need: random checkpoints, their oracles, and meshes of real processes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from afd.bench import counters
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.model.checkpoint import Checkpoint
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.transformer import Transformer
from afd.model.weights import load_all
from afd.state.embedded import EmbeddedRedis

os.environ.setdefault("AFD_LOG_LEVEL", "warning")
torch.set_num_threads(1)

LOGPROB_BOUND = 1e-4

HAS_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed")
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk, and the oracle of it."""

    path: Path
    oracle: Transformer

    @property
    def vocab_size(self) -> int:
        return self.oracle.config.vocab_size

    def prompt(self, length: int, seed: int) -> list[int]:
        chooser = random.Random(seed)
        return [chooser.randrange(2, self.vocab_size) for _ in range(length)]

    @torch.inference_mode()
    def check_greedy(self, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
        """Asserts that the oracle, given the prompt, yields exactly these tokens one after the other."""
        logits = self.oracle(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(dim=-1).tolist()
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_BOUND)


def odd_sizes(seed: int) -> ModelSizes:
    """Sizes that no shard count divides, dense layers anywhere."""
    chooser = random.Random(seed)
    num_layers = chooser.randint(3, 5)
    moe_layers = sorted(chooser.sample(range(num_layers), chooser.randint(1, num_layers - 1)))
    num_experts = chooser.randint(3, 11)
    return ModelSizes(
        num_hidden_layers=num_layers,
        hidden_size=chooser.randrange(30, 90),
        num_attention_heads=chooser.choice([1, 3, 5, 7]),
        head_dim=2 * chooser.randint(3, 13),
        share_q_dim=chooser.randint(9, 61),
        intermediate_size=chooser.randint(20, 111),
        moe_num_experts=num_experts,
        moe_top_k=chooser.randint(1, min(4, num_experts)),
        moe_intermediate_size=chooser.randint(7, 41),
        share_expert_dim=chooser.randint(1, 37),
        moe_layers_enum=",".join(map(str, moe_layers)),
        vocab_size=chooser.randint(300, 700),
        max_seq_len=1024,
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Model]:
    """The random model of a seed; odd seeds are split over many files."""
    made: dict[int, Model] = {}

    def make(seed: int) -> Model:
        if seed not in made:
            path = tmp_path_factory.mktemp("checkpoints") / f"random-{seed}"
            max_file_bytes = 60_000 if seed % 2 else 1 << 30
            make_checkpoint(path, odd_sizes(seed), seed=seed, max_file_bytes=max_file_bytes)
            checkpoint = Checkpoint(path)
            made[seed] = Model(path, Transformer(checkpoint.config, load_all(checkpoint)))
        return made[seed]

    return make


def wait_for_zero(mesh: Mesh, names: tuple[str, ...], timeout_s: float = 10.0) -> dict[str, float]:
    """The counters once all are zero, or as they are when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        values = {name: counters(mesh)[name] for name in names}
        if not any(values.values()) or time.monotonic() > deadline:
            return values
        time.sleep(0.05)


StartMesh = Callable[..., contextlib.AbstractContextManager[Mesh]]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Loads torch once for the meshes of all tests."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def start_mesh(fork_server: ForkServer) -> StartMesh:
    """Runs a mesh of real processes in float32; keyword arguments are settings, as in `num_kv_blocks=8`."""

    @contextlib.contextmanager
    def start(
        model: Path,
        attention: int = 1,
        ffn: int = 1,
        device: str = "cpu",
        microbatches: int | str = 2,
        ffn_replicas: int = 1,
        redis: str | None = None,
        tls: Path | None = None,
        **settings: object,
    ) -> Iterator[Mesh]:
        options = MeshOptions(
            model=model,
            attention=attention,
            ffn=ffn,
            ffn_replicas=ffn_replicas,
            microbatches=str(microbatches),
            dtype="float32",
            device=device,
            redis=redis,
            tls=tls,
            threads=1,
            settings={name: str(value) for name, value in settings.items()},
        )
        with running_mesh(options, fork_server) as mesh:
            yield mesh

    return start


@contextlib.contextmanager
def embedded_redis(binary: str | None = None) -> Iterator[str]:
    """The URL of a redis-server that lives as long as the block."""
    with EmbeddedRedis(binary) as server:
        yield server.url


@pytest.fixture
def real_redis(tmp_path: Path) -> Iterator[str]:
    """URL of a redis-server of its own: the one on PATH, else the one that the embedded default carries."""
    with embedded_redis(shutil.which("redis-server")) as url:
        yield url
