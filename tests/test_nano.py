"""step3-nano answers right: by the oracle, and through the demo's mesh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_held_out_questions_are_answered_right(dtype: str) -> None:
    result = run("models.evaluate", "--questions", "60", "--dtype", dtype)
    assert result.returncode == 0, result.stdout


def test_evaluation_of_an_untrained_model_fails(tmp_path: Path) -> None:
    made = run("afd", "make-checkpoint", str(tmp_path / "untrained"), "--vocab", "418")
    assert made.returncode == 0
    nano = ROOT / "models" / "step3-nano"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "untrained" / name).write_text((nano / name).read_text())
    assert run("models.evaluate", "--questions", "5", "--model", str(tmp_path / "untrained")).returncode == 1


def test_demo_answers_right_and_shows_a_step() -> None:
    result = run("models.demo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 of 10 right" in result.stdout
    assert "FFN 1/2" in result.stdout


def test_checkpoint_is_small_enough_to_keep() -> None:
    files = (ROOT / "models" / "step3-nano").iterdir()
    assert sum(path.stat().st_size for path in files) <= 12 << 20
