"""FP8 to the FFN and bfloat16 back: what it does to the answers and to the bytes, `python -m benchmarks.fp8`.

A trained model decodes held-out questions and their right answers, teacher-forced: whatever a run finds likeliest, the
next token is the one that is there, so that all runs decide the same positions. Attention and an FFN shard are those
that are served, and every frame is written to a slot, checked and read from it as between processes; only the way
between the slots is left out. An answer is right if every one of its tokens is the likeliest, so that greedy decoding
would give it. What a user asks next can only be guessed: tokens of questions are close calls, those of answers are not.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afd.handoff.fp8 import FP8
from afd.handoff.frame import Frame, FrameRules, InFlight
from afd.handoff.local import LocalFFN
from afd.handoff.slots import AnswerSlots, FrameSlots, Region, SlotShape
from afd.model.checkpoint import Checkpoint
from afd.model.ffn import FFNShard
from afd.model.kv_cache import KVCache
from afd.model.moe import Routing
from afd.model.sampling_params import SamplingParams
from afd.model.transformer import Transformer
from afd.model.weights import load_attention, load_ffn_shard
from afd.state.requests import SequenceKey
from models.evaluate import DEFAULT_DIR, Answerer
from models.tasks import TASKS, Question, held_out
from services.attention.block_manager import BlockManager
from services.attention.chunk import Chunk
from services.attention.decoder import Decoder
from services.attention.microbatch import MicrobatchBuilder
from services.attention.sequence import Sequence
from services.attention.timeline import Timeline

CPU, BF16 = torch.device("cpu"), torch.bfloat16
_BLOCK_SIZE = 16
_BATCH = 64  # conversations decoded at once
_LONGEST = 256  # tokens of a conversation


# The accuracy.

Part = Literal["questions", "answers"]


@dataclass(frozen=True)
class Conversation:
    """A question, and its right answer with the token that ends it."""

    ids: list[int]
    num_prompt: int

    def cut(self, part: Part) -> slice:
        """Its place in what is decoded, which is all but the first token."""
        return slice(0, self.num_prompt - 1) if part == "questions" else slice(self.num_prompt - 1, None)


@dataclass(frozen=True)
class Run:
    """What one way of computing says: for each conversation of N tokens, logits [N - 1, V] of all but the first."""

    name: str
    logits: list[Tensor]


@dataclass(frozen=True)
class Agreement:
    """Of two runs, over all tokens of questions or of answers; a log-probability is that of the token that is there."""

    part: Part
    runs: tuple[str, str]
    num_tokens: int
    top_1: float
    mean_logprob_difference: float
    max_logprob_difference: float


class SlotFFN(LocalFFN):
    """The FFN in this process, with frames and answers that cross in slots all the same."""

    def __init__(self, shard: FFNShard, shape: SlotShape) -> None:
        super().__init__(shard)
        self.frames = FrameSlots(Region.private(shape.num_slots * shape.frame_stride), shape)
        self.answers = AnswerSlots(Region.private(shape.num_slots * shape.answer_stride), shape)
        self.rules = FrameRules(shard.config, shape.dtype, shape.max_tokens)
        self._frame_ids = itertools.count(1)

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        self.frames.write(Frame(next(self._frame_ids), batch.slot, layer_idx, ffn_input, routing))
        crossed = self.frames.read(batch.slot, self.rules)
        super().send(batch, crossed.layer_idx, crossed.ffn_input, crossed.routing)

    def receive(self, batch: InFlight) -> Tensor:
        return self.answers.buffer(batch.slot, batch.num_tokens).copy_(super().receive(batch))


def slot_decoder(checkpoint: Checkpoint, frame_dtype: torch.dtype) -> Decoder:
    """A replica's decoder in bfloat16, and one FFN shard behind it."""
    config = checkpoint.config
    shape = SlotShape(1, _BATCH * _LONGEST, config.hidden_size, config.top_k, BF16, frame_dtype, BF16)
    stack = load_attention(checkpoint, BF16, CPU, lambda done, total: None)
    shard = load_ffn_shard(checkpoint, 0, 1, BF16, CPU, lambda done, total: None)
    cache = KVCache.allocate(config.num_layers, _BATCH * _LONGEST, config.head_dim, BF16, CPU)
    return Decoder(stack, cache, SlotFFN(shard, shape))


class ForcedReader:
    """Decodes conversations step by step as the engine does, whose sampler would choose what is already there."""

    def __init__(self, checkpoint: Checkpoint, frame_dtype: torch.dtype) -> None:
        config = checkpoint.config
        self.decoder = slot_decoder(checkpoint, frame_dtype)
        self.blocks = BlockManager(_BATCH * _LONGEST // _BLOCK_SIZE, _BLOCK_SIZE)
        self.builder = MicrobatchBuilder(_BLOCK_SIZE, config.head_dim, config.rope_theta, BF16, CPU)

    def run(self, name: str, conversations: list[Conversation]) -> Run:
        batches = (conversations[start : start + _BATCH] for start in range(0, len(conversations), _BATCH))
        return Run(name, [logits for batch in batches for logits in self._read(batch)])

    @torch.inference_mode()
    def _read(self, conversations: list[Conversation]) -> list[Tensor]:
        ids = {_sequence(conversation): conversation.ids for conversation in conversations}
        logits: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in ids}
        while reading := [sequence for sequence in ids if sequence.num_tokens < len(ids[sequence])]:
            for sequence, row in self._step(reading):
                logits[sequence].append(row)
                sequence.output_ids.append(ids[sequence][sequence.num_tokens])
        for sequence in ids:
            self.blocks.free(sequence)
        return [torch.stack(rows) for rows in logits.values()]

    def _step(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, Tensor]]:
        """The logits [V] of each sequence's next token."""
        for sequence in sequences:
            self.blocks.grow(sequence, sequence.num_tokens)
        batch = self.builder.build(0, [Chunk(sequence, sequence.num_uncomputed) for sequence in sequences])
        for _ in self.decoder.forward(batch, Timeline()):
            pass
        for sequence in sequences:
            sequence.num_computed = sequence.num_tokens
        return zip(batch.sampled, self.decoder.logits(batch), strict=True)


def _sequence(conversation: Conversation) -> Sequence:
    return Sequence(SequenceKey(""), 1, conversation.ids[:1], [], SamplingParams(), (), _LONGEST)


@torch.inference_mode()
def oracle_run(oracle: Transformer, conversations: list[Conversation]) -> Run:
    """In float32, each conversation as a whole."""
    return Run("float32", [oracle(torch.tensor([conversation.ids]))[0, :-1] for conversation in conversations])


def held_out_conversations(answerer: Answerer, num_questions: int) -> list[Conversation]:
    """At most so many questions of each task."""
    questions = (question for task in TASKS for question in held_out(task, num_questions))
    return [_conversation(answerer, question) for question in questions]


def _conversation(answerer: Answerer, question: Question) -> Conversation:
    prompt = answerer.render(question.prompt)
    num_prompt, ids = len(_encode(answerer, prompt)), _encode(answerer, prompt + question.answer)
    return Conversation([*ids, answerer.eos_ids[0]], num_prompt)


def _encode(answerer: Answerer, text: str) -> list[int]:
    return list(answerer.tokenizer.encode(text, add_special_tokens=False).ids)


def all_runs(model_dir: Path, conversations: list[Conversation], oracle: Transformer) -> tuple[Run, Run, Run]:
    """With FP8, without it, and in float32."""
    checkpoint = Checkpoint(model_dir)
    return (
        ForcedReader(checkpoint, FP8).run("fp8", conversations),
        ForcedReader(checkpoint, BF16).run("bfloat16", conversations),
        oracle_run(oracle, conversations),
    )


def num_right(run: Run, conversations: list[Conversation]) -> int:
    """Answers of which greedy decoding gives every token."""
    likeliest = [logits.argmax(dim=-1).tolist() for logits in run.logits]
    return sum(
        tokens[asked.cut("answers")] == asked.ids[asked.num_prompt :]
        for tokens, asked in zip(likeliest, conversations, strict=True)
    )


def agreement(part: Part, one: Run, other: Run, conversations: list[Conversation]) -> Agreement:
    cuts = [conversation.cut(part) for conversation in conversations]
    there = torch.tensor([token for c, cut in zip(conversations, cuts, strict=True) for token in c.ids[1:][cut]])
    both = [torch.cat([row[cut] for row, cut in zip(run.logits, cuts, strict=True)]) for run in (one, other)]
    tops = [logits.argmax(dim=-1) for logits in both]
    logprobs = [logits.log_softmax(dim=-1).gather(1, there[:, None]) for logits in both]
    differences = (logprobs[0] - logprobs[1]).abs()
    return Agreement(
        part=part,
        runs=(one.name, other.name),
        num_tokens=len(there),
        top_1=float((tops[0] == tops[1]).float().mean()),
        mean_logprob_difference=float(differences.mean()),
        max_logprob_difference=float(differences.max()),
    )


# The bytes.


@dataclass(frozen=True)
class FrameSize:
    """Bytes of a frame with its header, expert ids, weights and scales."""

    model: str
    hidden_size: int
    top_k: int
    num_tokens: int

    @property
    def bfloat16(self) -> int:
        return self._num_bytes(BF16)

    @property
    def fp8(self) -> int:
        return self._num_bytes(FP8)

    @property
    def ratio(self) -> float:
        return self.fp8 / self.bfloat16

    def _num_bytes(self, frame_dtype: torch.dtype) -> int:
        shape = SlotShape(1, self.num_tokens, self.hidden_size, self.top_k, BF16, frame_dtype, BF16)
        return shape.frame_bytes(self.num_tokens)


FRAME_SIZES = tuple(
    FrameSize(model, hidden_size, top_k, num_tokens)
    for model, hidden_size, top_k in (("step3-nano", 128, 2), ("0.6 B", 1024, 3), ("Step-3", 7168, 3))
    for num_tokens in (1, 128)
)


# The report.


def agreement_table(agreements: list[Agreement]) -> Table:
    made = Table(title="the same token is the likeliest; |difference| of log-probability")
    for column in ("tokens of", "number", "runs", "same, %", "mean", "max"):
        made.add_column(column, justify="right")
    for row in agreements:
        differences = (f"{value:.1g}" for value in (row.mean_logprob_difference, row.max_logprob_difference))
        made.add_row(row.part, str(row.num_tokens), " and ".join(row.runs), f"{100 * row.top_1:.2f}", *differences)
    return made


def right_table(right: dict[str, int], num_questions: int) -> Table:
    made = Table("run", "right", "asked", title="answers")
    for name, number in right.items():
        made.add_row(name, str(number), str(num_questions))
    return made


def frame_table() -> Table:
    made = Table(title="bytes of a frame")
    for column in ("model", "hidden", "top_k", "tokens", "bfloat16", "fp8", "fp8 / bfloat16"):
        made.add_column(column, justify="right")
    for size in FRAME_SIZES:
        sizes = size.hidden_size, size.top_k, size.num_tokens, size.bfloat16, size.fp8
        made.add_row(size.model, *map(str, sizes), f"{size.ratio:.3f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="FP8 to the FFN and bfloat16 back: answers and bytes.")
    parser.add_argument("--model", type=Path, default=DEFAULT_DIR, help="the model directory")
    parser.add_argument("--questions", type=int, default=600, help="at most so many per task")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    answerer = Answerer(options.model, torch.float32)
    conversations = held_out_conversations(answerer, options.questions)
    runs = all_runs(options.model, conversations, answerer.model)
    pairs = [(part, *pair) for part in get_args(Part) for pair in itertools.combinations(runs, 2)]
    agreements = [agreement(*pair, conversations) for pair in pairs]
    right = {run.name: num_right(run, conversations) for run in runs}
    console = Console()
    for table in (agreement_table(agreements), right_table(right, len(conversations)), frame_table()):
        console.print(table)
    if options.json:
        frames = [{**asdict(size), "bfloat16": size.bfloat16, "fp8": size.fp8} for size in FRAME_SIZES]
        figures = {"agreements": [asdict(row) for row in agreements], "right": right, "asked": len(conversations)}
        options.json.write_text(json.dumps({**figures, "frames": frames}, indent=2) + "\n")


if __name__ == "__main__":
    main()
