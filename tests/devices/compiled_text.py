"""What the text of a compiled program says of its collectives."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective: its kind, the shapes of what it makes on one device, and whether it is in a loop."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    looped: bool

    @property
    def largest(self) -> int:
        """Elements of the largest array it makes."""
        return max(map(math.prod, self.shapes), default=0)


def collectives(program: str) -> list[Collective]:
    """All collectives of a program, those inside other computations included."""
    blocks = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", program, re.M | re.S))
    calls = {name: set(re.findall(r"%([\w.-]+)", body)) & blocks.keys() for name, body in blocks.items()}
    looped: set[str] = set()
    waiting = re.findall(r" while\(.*?body=%([\w.-]+)", program)
    while waiting:
        name = waiting.pop()
        if name not in looped:
            looped.add(name)
            waiting += calls[name]
    operation = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
    return [
        Collective(kind, tuple(map(_sizes, re.findall(r"\w+\[([\d,]*)\]", made))), name in looped)
        for name, body in blocks.items()
        for made, kind in operation.findall(body)
    ]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))
