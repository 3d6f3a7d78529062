"""The toy task: converting quantities, with a worked line, and a teacher and a student that disagree.

    How many eggs are 7 dozen and 5?   ->   7 × 12 = 84
                                            84 + 5 = 89
                                            Zoë has 89 eggs.

The student can multiply and add, but believes in other factors (a dozen is 10, an hour has 100
minutes): wrong habits, which on-policy distillation is good at mending. Held-out prompts have pairs of
numbers (n, m) that no training problem of any kind has.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("Zoë", "José", "Chloé", "Søren", "Anna", "Tom", "Mia", "Jürgen")
COUNTS = range(2, 16)  # n: dozens, weeks, hours, euros
EXTRAS = range(1, 10)  # m: what comes on top


@dataclass(frozen=True)
class Kind:
    """One kind of problem; `habit` is the factor the student believes in."""

    question: str
    conclusion: str
    factor: int
    habit: int


KINDS = (
    Kind("{name} has {n} dozen eggs and {m} more. How many eggs?", "{name} has {r} eggs.", 12, 10),
    Kind("{name} waits {n} weeks and {m} days. How many days?", "{name} waits {r} days.", 7, 5),
    Kind("{name} works {n} hours and {m} minutes. How many minutes?", "{name} works {r} minutes.", 60, 100),
    Kind("{name} pays {n} € and {m} ¢. How many ¢?", "{name} pays {r} ¢.", 100, 10),
)


def worked(n: int, factor: int, m: int, conclusion: str) -> str:
    """The worked lines and the conclusion."""
    product = n * factor
    return f"{n} × {factor} = {product}\n{product} + {m} = {product + m}\n{conclusion.format(r=product + m)}"


def problem(kind: Kind, name: str, n: int, m: int, factor: int) -> dict[str, Any]:
    """A data row worked with `factor`; its `answer` is always the true conclusion."""
    question = kind.question.format(name=name, n=n, m=m)
    conclusion = kind.conclusion.replace("{name}", name)
    return {
        "messages": [{"role": "user", "content": question}],
        "answer": conclusion.format(r=n * kind.factor + m),
        "response": worked(n, factor, m, conclusion),
    }


def drill(rng: random.Random) -> dict[str, Any]:
    """Plain arithmetic with any of the factors: the skill without the habit."""
    kind = rng.choice(KINDS)
    n, m, factor = rng.choice(COUNTS), rng.choice(EXTRAS), rng.choice((kind.factor, kind.habit))
    return {
        "messages": [{"role": "user", "content": f"Compute {n} × {factor} + {m}."}],
        "response": worked(n, factor, m, "The result is {r}."),
    }


def split_pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All (n, m), split into training and held-out pairs, a fifth held out."""
    pairs = [(n, m) for n in COUNTS for m in EXTRAS]
    random.Random(seed).shuffle(pairs)
    cut = len(pairs) // 5
    return pairs[cut:], pairs[:cut]


def problems(pairs: list[tuple[int, int]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different problems over `pairs`, worked rightly."""
    rng = random.Random(seed)
    every = [(kind, name, n, m) for kind in KINDS for name in NAMES for n, m in pairs]
    return [problem(k, name, n, m, k.factor) for k, name, n, m in rng.sample(every, count)]


def lessons(
    pairs: list[tuple[int, int]], count: int, seed: int, *, habit: float
) -> Iterator[Mapping[str, Any]]:
    """What a model is trained on: half drills, half problems, of which the share `habit` is worked with
    the wrong factor."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.5:
            yield drill(rng)
            continue
        kind, name, (n, m) = rng.choice(KINDS), rng.choice(NAMES), rng.choice(pairs)
        yield problem(kind, name, n, m, kind.habit if rng.random() < habit else kind.factor)
