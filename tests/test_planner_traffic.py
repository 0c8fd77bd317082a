"""Lengths of prompts and outputs: means, the live context, samples, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from afd.errors import ConfigError
from afd.planner.traffic import Drawn, Recorded, distribution, read_lengths

KINDS = ["500", "uniform:100,900", "geometric:500", "lognormal:500,0.8"]


def test_the_live_context_by_hand() -> None:
    """Of P = 10 with D = 1 and P = 100 with D = 3: steps see 10, and 100, 101, 102."""
    recorded = Recorded(np.array([10, 100]), np.array([1, 3]))
    assert recorded.live_context == pytest.approx((10 + 100 + 101 + 102) / 4)
    assert Drawn(distribution("100"), distribution("3")).live_context == pytest.approx(101)
    assert (recorded.prompt_tokens, recorded.output_tokens) == (55, 2)


@pytest.mark.parametrize("output", KINDS)
@pytest.mark.parametrize("prompt", KINDS)
def test_the_live_context_is_that_of_the_samples(prompt: str, output: str) -> None:
    lengths = Drawn(distribution(prompt), distribution(output))
    drawn = Recorded(*lengths.sample(np.random.default_rng(0), 200_000))
    assert lengths.prompt_tokens == pytest.approx(drawn.prompt_tokens, rel=0.02)
    assert lengths.output_tokens == pytest.approx(drawn.output_tokens, rel=0.02)
    assert lengths.live_context == pytest.approx(drawn.live_context, rel=0.02)


def test_recorded_requests_are_drawn_in_pairs(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"prompt_tokens": 5, "output_tokens": 50}\n\n{"prompt_tokens": 7, "output_tokens": 70, "user": 1}\n'
    )
    prompts, outputs = read_lengths(file).sample(np.random.default_rng(0), 100)
    assert set(zip(prompts.tolist(), outputs.tolist(), strict=True)) == {(5, 50), (7, 70)}


def test_recorded_requests_are_replayed_in_the_order_of_their_moments(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"prompt_tokens": 5, "output_tokens": 50, "at_s": 2.5}\n{"prompt_tokens": 7, "output_tokens": 70, "at_s": 1}\n'
    )
    found = read_lengths(file)
    assert found.at_s is not None
    assert (found.at_s.tolist(), found.prompts.tolist(), found.outputs.tolist()) == ([1, 2.5], [7, 5], [70, 50])


@pytest.mark.parametrize(
    "text", ["", "many", "0", "-5", "nan", "inf", "1e12", "uniform:9,1", "uniform:0,9", "uniform:5", "geometric:0.5",
             "lognormal:500,-1", "lognormal:100,50", "lognormal:500", "pareto:1,2", "geometric:", "500,600"],
)  # fmt: skip
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        distribution(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no requests"),
        ('{"prompt_tokens": 5}', "line 1"),
        ('{"prompt_tokens": 5, "output_tokens": 1}\n{"prompt_tokens": 5, "output_tokens": 0}', "line 2"),
        ('{"prompt_tokens": 5, "output_tokens": true}', "line 1"),
        ("[5, 1]", "line 1"),
        ("5 1", "line 1"),
        (
            '{"prompt_tokens": 5, "output_tokens": 1, "at_s": 1}\n{"prompt_tokens": 5, "output_tokens": 1}',
            "line 2: at_s",
        ),
        ('{"prompt_tokens": 5, "output_tokens": 1, "at_s": -1}', "line 1: at_s"),
        ('{"prompt_tokens": 5, "output_tokens": 1, "at_s": NaN}', "line 1: at_s"),
        ('{"prompt_tokens": 5, "output_tokens": 1, "at_s": true}', "line 1: at_s"),
    ],
)
def test_a_file_that_has_no_lengths_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        read_lengths(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lengths(tmp_path)
