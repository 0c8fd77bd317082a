"""The tasks of the small trained model: questions that anybody can check, and which of them training never sees.

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_NUMBERS = range(100)
_SPANS = range(1, 10)
_WORD_LENGTHS = range(3, 7)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnprstvwyz"
_HELD_OUT_PERCENT = 10

Operands = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What the user writes, and the one right answer."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of problem. A problem is its operands; each phrasing, filled in with them, asks the same of it."""

    name: str
    phrasings: tuple[str, ...]
    training_share: float
    draw: Callable[[Random], Operands]
    answer: Callable[[Operands], str]
    enumerate: Callable[[], Iterator[Operands]] | None = None

    def questions(self, operands: Operands) -> list[Question]:
        """The problem in each phrasing."""
        answer = self.answer(operands)
        return [Question(self.name, phrasing.format(*operands), answer) for phrasing in self.phrasings]

    def is_held_out(self, operands: Operands) -> bool:
        """The same for every phrasing and every order of the operands, and on every machine."""
        problem = " ".join((self.name, *sorted(operands)))
        return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) % 100 < _HELD_OUT_PERCENT


def _draw_numbers(rng: Random) -> Operands:
    return str(rng.choice(_NUMBERS)), str(rng.choice(_NUMBERS))


def _all_numbers() -> Iterator[Operands]:
    return ((str(a), str(b)) for a in _NUMBERS for b in _NUMBERS)


def _draw_word(rng: Random) -> Operands:
    """Pronounceable one time in two, else any letters."""
    length = rng.choice(_WORD_LENGTHS)
    if rng.random() < 0.5:
        return ("".join(rng.choices(_LETTERS, k=length)),)
    vowel_first = rng.randrange(2)
    return ("".join(rng.choice(_VOWELS if (i + vowel_first) % 2 else _CONSONANTS) for i in range(length)),)


def _draw_span(rng: Random) -> Operands:
    return _span(rng.choice(_SPANS)), rng.choice(("after", "before")), rng.choice(DAYS)


def _all_spans() -> Iterator[Operands]:
    return ((_span(n), side, day) for n in _SPANS for side in ("after", "before") for day in DAYS)


def _span(num_days: int) -> str:
    return "1 day" if num_days == 1 else f"{num_days} days"


def _count_days(operands: Operands) -> str:
    """Every day on the way; the last one is the day asked for."""
    span, side, day = operands
    step = 1 if side == "after" else -1
    num_days = int(span.split()[0])
    return ", ".join(DAYS[(DAYS.index(day) + step * n) % len(DAYS)] for n in range(1, num_days + 1))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="addition",
            phrasings=("What is {0} + {1}?", "{0} + {1} =", "Add {0} and {1}."),
            training_share=0.25,
            draw=_draw_numbers,
            answer=lambda operands: str(int(operands[0]) + int(operands[1])),
            enumerate=_all_numbers,
        ),
        Task(
            name="subtraction",
            phrasings=("What is {0} - {1}?", "{0} - {1} =", "Subtract {1} from {0}."),
            training_share=0.27,
            draw=_draw_numbers,
            answer=lambda operands: str(int(operands[0]) - int(operands[1])),
            enumerate=_all_numbers,
        ),
        Task(
            name="reverse",
            phrasings=('Reverse the word "{0}".', 'Spell "{0}" backwards.', "Reverse: {0}"),
            training_share=0.1,
            draw=_draw_word,
            answer=lambda operands: operands[0][::-1],
        ),
        Task(
            name="sort",
            phrasings=('Sort the letters of "{0}".', 'Put the letters of "{0}" in alphabetical order.', "Sort: {0}"),
            training_share=0.3,
            draw=_draw_word,
            answer=lambda operands: "".join(sorted(operands[0])),
        ),
        Task(
            name="weekday",
            phrasings=("Which day comes {0} {1} {2}?", "What day is {0} {1} {2}?", "Name the day {0} {1} {2}."),
            training_share=0.08,
            draw=_draw_span,
            answer=_count_days,
            enumerate=_all_spans,
        ),
    )
}


def sample_training(rng: Random) -> Question:
    """A question that is not held out, of a task drawn by training_share."""
    (task,) = rng.choices(list(TASKS.values()), weights=[task.training_share for task in TASKS.values()])
    return _sample(task, rng, held_out=False)


def held_out(task_name: str, num_questions: int, seed: int = 0) -> list[Question]:
    """Different held-out questions of one task: all there are if fewer than num_questions, else a fixed sample."""
    task, rng = TASKS[task_name], Random(f"{seed} {task_name}")
    if task.enumerate is not None:
        problems = filter(task.is_held_out, task.enumerate())
        questions = [question for operands in problems for question in task.questions(operands)]
        return rng.sample(questions, min(num_questions, len(questions)))
    sample: dict[Question, None] = {}
    while len(sample) < num_questions:
        sample[_sample(task, rng, held_out=True)] = None
    return list(sample)


def _sample(task: Task, rng: Random, *, held_out: bool) -> Question:
    while task.is_held_out(operands := task.draw(rng)) is not held_out:
        pass
    return rng.choice(task.questions(operands))
