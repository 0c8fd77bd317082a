"""How many held-out questions a model answers rightly, decoded greedily by the oracle.

    python -m models.evaluate --model models/step3-nano --dtype bfloat16

Exits with status 1 if fewer than 99 % are right.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from jinja2 import Template
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from afd.model.checkpoint import Checkpoint
from afd.model.fields import read_json
from afd.model.transformer import Transformer
from afd.model.weights import load_all
from models.tasks import TASKS, held_out

DEFAULT_DIR = Path(__file__).parent / "step3-nano"
REQUIRED_SHARE = 0.99

_MAX_ANSWER_TOKENS = 24
_MAX_BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEFAULT_DIR, help="the model directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--questions", type=int, default=600, help="at most so many per task")
    args = parser.parse_args()
    answerer = Answerer(args.model, getattr(torch, args.dtype))
    table = Table("task", "right", "asked", "percent", title=f"{args.model.name}, {args.dtype}")
    total_right = total_asked = 0
    for task in TASKS:
        questions = held_out(task, args.questions)
        answers = answerer.answers([question.prompt for question in questions])
        right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
        table.add_row(task, *_counts(right, len(questions)))
        total_right += right
        total_asked += len(questions)
    table.add_section()
    table.add_row("all", *_counts(total_right, total_asked))
    Console().print(table)
    sys.exit(0 if total_right >= REQUIRED_SHARE * total_asked else 1)


def _counts(right: int, asked: int) -> tuple[str, str, str]:
    return str(right), str(asked), f"{100 * right / asked:.2f}"


class Answerer:
    """A model directory, to be asked many questions at once."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        checkpoint = Checkpoint(model_dir)
        self.model = Transformer(checkpoint.config, load_all(checkpoint, dtype))
        self.eos_ids = checkpoint.config.eos_token_ids
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.tokenizer_config = read_json(model_dir / "tokenizer_config.json")
        self.template = Template(self.tokenizer_config["chat_template"])

    def answers(self, prompts: list[str]) -> list[str]:
        """The answer to each prompt, every prompt being a conversation of its own."""
        by_length: dict[int, list[int]] = defaultdict(list)
        ids = [self.tokenizer.encode(self.render(prompt), add_special_tokens=False).ids for prompt in prompts]
        for index, row in enumerate(ids):
            by_length[len(row)].append(index)
        answers = [""] * len(prompts)
        for indices in by_length.values():
            for start in range(0, len(indices), _MAX_BATCH):
                batch = indices[start : start + _MAX_BATCH]
                for index, tokens in zip(batch, self.generate([ids[index] for index in batch]), strict=True):
                    answers[index] = self.tokenizer.decode(tokens)
        return answers

    def render(self, prompt: str) -> str:
        """The conversation that asks the prompt, up to where the answer begins."""
        special = {name: self.tokenizer_config[name] for name in ("bos_token", "eos_token")}
        messages = [{"role": "user", "content": prompt}]
        return str(self.template.render(messages=messages, add_generation_prompt=True, **special))

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """The likeliest tokens after each of the prompts, which are equally long, up to its end token, left out."""
        ids = torch.tensor(prompts)  # [B, T], growing by a column a step
        eos_ids = torch.tensor(self.eos_ids)
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(_MAX_ANSWER_TOKENS):
            ids = torch.cat((ids, self.model(ids)[:, -1:].argmax(dim=-1)), dim=1)
            ended |= torch.isin(ids[:, -1], eos_ids)
            if ended.all():
                break
        return [_until(row[len(prompt) :], self.eos_ids) for row, prompt in zip(ids.tolist(), prompts, strict=True)]


def _until(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    stop = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:stop]


if __name__ == "__main__":
    main()
