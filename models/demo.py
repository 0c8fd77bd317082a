"""`make demo`: a mesh on this machine answers a few questions of step3-nano's held-out set, and shows one step."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from afd import Client
from afd.errors import AfdError
from afd.mesh import MeshOptions, running_mesh
from afd.trace_view import load_steps, pick
from afd.trace_view.terminal import timeline
from models.tasks import TASKS, Question, held_out

MODEL = Path(__file__).parent / "step3-nano"
_QUESTIONS_PER_TASK = 2
_LONGEST_ANSWER = 128  # tokens
_PIPE_COLUMNS = 110

console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def main() -> None:
    os.environ.setdefault("AFD_LOG_LEVEL", "warning")
    try:
        with tempfile.TemporaryDirectory(prefix="afd-demo-") as directory:
            all_right = run(Path(directory) / "spans.jsonl")
    except AfdError as error:
        sys.exit(f"demo: {error}")
    sys.exit(0 if all_right else 1)


def run(trace_file: Path) -> bool:
    """Whether every answer was right."""
    options = MeshOptions(
        MODEL,
        ffn=2,
        microbatches="2",
        threads=1,
        dtype="float32",
        settings={"trace_sample": "1", "trace_file": str(trace_file)},
    )
    console.print("starting gateway, 1 attention replica, 2 FFN shards and an embedded Redis ...")
    with running_mesh(options) as mesh:
        for service in mesh.services:
            assert service.replica is not None
            console.print(f"  {service.replica_id:<12} {service.replica.address}")
        console.print()
        all_right = asyncio.run(ask_all(mesh.gateway.address))
    steps = load_steps(trace_file)
    console.print(timeline(pick(steps), console.width))
    return all_right


async def ask_all(address: str) -> bool:
    questions = [question for task in TASKS for question in held_out(task, _QUESTIONS_PER_TASK)]
    async with Client(address) as client:
        right = [await ask(client, question) for question in questions]
        console.print(f"\n{sum(right)} of {len(right)} right; the model never saw these questions in training")
        together = await asyncio.gather(*(answer_of(client, question) for question in questions))
    same = sum(answer == question.answer for answer, question in zip(together, questions, strict=True))
    console.print(f"asked again, all at once: {same} of {len(right)} right\n")
    return all(right) and same == len(right)


async def answer_of(client: Client, question: Question) -> str:
    tokens = client.chat([{"role": "user", "content": question.prompt}], max_tokens=_LONGEST_ANSWER)
    return "".join([token.text async for token in tokens]).strip()


async def ask(client: Client, question: Question) -> bool:
    """Streams the answer, and says whether it is the right one."""
    console.print(f"{question.prompt:<60}", end=" ")
    answer = ""
    async for token in client.chat([{"role": "user", "content": question.prompt}], max_tokens=_LONGEST_ANSWER):
        answer += token.text
        console.print(token.text, end="")
    is_right = answer.strip() == question.answer
    console.print("  [green]right[/]" if is_right else f"  [red]wrong[/], it is {question.answer}")
    return is_right


if __name__ == "__main__":
    main()
