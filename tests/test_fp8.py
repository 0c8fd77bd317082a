"""FP8 to the FFN and bfloat16 back: step3-nano answers as it does without, and frames are half as large."""

from __future__ import annotations

import pytest
import torch

from afd.handoff.fp8 import FP8
from afd.model.checkpoint import Checkpoint
from benchmarks.fp8 import BF16, FRAME_SIZES, ForcedReader, FrameSize, agreement, held_out_conversations, num_right
from models.evaluate import DEFAULT_DIR, Answerer


def test_fp8_chooses_the_tokens_that_bfloat16_chooses() -> None:
    checkpoint = Checkpoint(DEFAULT_DIR)
    conversations = held_out_conversations(Answerer(DEFAULT_DIR, torch.float32), num_questions=16)
    with_fp8 = ForcedReader(checkpoint, FP8).run("fp8", conversations)
    without = ForcedReader(checkpoint, BF16).run("bfloat16", conversations)
    answers = agreement("answers", with_fp8, without, conversations)
    questions = agreement("questions", with_fp8, without, conversations)
    assert answers.num_tokens + questions.num_tokens > 1000
    assert answers.top_1 >= 0.99
    assert questions.top_1 >= 0.96  # any digit may come next: these are close calls
    assert questions.max_logprob_difference > 0  # something was rounded
    assert num_right(with_fp8, conversations) == num_right(without, conversations)


@pytest.mark.parametrize("size", FRAME_SIZES, ids=lambda size: f"{size.model}, {size.num_tokens}")
def test_fp8_saves_a_byte_of_every_number_and_adds_a_scale_for_every_token(size: FrameSize) -> None:
    saved = size.num_tokens * (size.hidden_size - 4)
    assert size.bfloat16 - size.fp8 == pytest.approx(saved, abs=64)  # where ffn_input begins is aligned


@pytest.mark.parametrize(("hidden_size", "num_tokens"), [(1024, 128), (7168, 1), (7168, 128)])
def test_fp8_frames_of_large_models_take_at_most_52_percent(hidden_size: int, num_tokens: int) -> None:
    assert FrameSize("", hidden_size, 3, num_tokens).ratio <= 0.52
