"""A chat of several turns as one sequence of ids that says which of them the assistant wrote.

Letters: P ids of the chat.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jaxdistill.errors import ConfigError, DataError
from jaxdistill.records import Message

Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) -> text


@dataclass(frozen=True)
class RenderedTurns:
    """A whole chat in one tokenizer's ids.

    `turns[k]` is the range of ids that the k-th assistant turn would generate: behind the generation
    prompt, up to and with its end of turn. Everything else (system, user and tool messages, and the marks
    the template puts around turns) is only read.
    """

    ids: Int32[np.ndarray, " P"]
    turns: tuple[range, ...]

    @cached_property
    def assistant_mask(self) -> Bool[np.ndarray, " P"]:
        """True where the assistant wrote the token: what a loss may be taken on."""
        mask = np.zeros(len(self.ids), bool)
        for turn in self.turns:
            mask[turn.start : turn.stop] = True
        return mask


def find_turns(
    messages: Sequence[Message], render: Render, ends: Sequence[str], where: str, *, last_only: bool = False
) -> tuple[str, list[range]]:
    """The chat's text and its assistant turns (or the last of them alone) as ranges of its characters, from
    renderings of the chat's beginnings.

    What a turn generates begins where the rendering of the messages before it, with a generation prompt,
    ends. It stops behind the last of the strings `ends` in the rendering up to the turn. Both beginnings
    must be beginnings of the whole chat too.

    Raises DataError, naming the turn, where the template writes a turn otherwise once others follow (as
    those do that leave earlier reasoning out): then no one sequence holds what each turn was generated from.
    """
    whole = render(messages, False)
    turns: list[range] = []
    written = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    for index in written[-1:] if last_only else written:
        if index == 0:
            raise DataError(f"{where}: the chat begins with an assistant turn; expected a user's before it")
        opened = render(messages[:index], True)
        closed = render(messages[: index + 1], False)
        if not closed.startswith(opened):
            raise _rewritten(where, index, "its own generation prompt", opened, closed)
        # The last mark, since some templates open the next turn behind it whether asked to or not.
        stop = max(
            (closed.rfind(end) + len(end) for end in ends if closed.rfind(end) >= len(opened)), default=-1
        )
        if stop < 0:
            raise DataError(
                f"{where}: no end of turn behind the assistant's message {index} "
                f"({closed[len(opened) :][-40:]!r}, expected one of {list(ends)}); name the token that ends "
                "this model's turns under roles in the configuration"
            )
        if not whole.startswith(closed[:stop]):
            raise _rewritten(where, index, "what later messages make of it", closed[:stop], whole)
        turns.append(range(len(opened), stop))
    return whole, turns


def _rewritten(where: str, index: int, other: str, wanted: str, got: str) -> DataError:
    at = next(
        (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
    )
    shown = f"{wanted[at : at + 30]!r} against {got[at : at + 30]!r}"
    return DataError(
        f"{where}: the chat template rewrites earlier turns: message {index} (assistant) differs from "
        f"{other} at character {at} ({shown}), so one sequence cannot hold all turns; take the last turn "
        "alone (rollout.reference_turns=last), or make one row of each turn with the messages before it"
    )


class TurnEncoder:
    """Turns text into ids as a model would have met or written it.

    `prompt_ids` parses every control string, as templates need. `content_ids` takes text as plain content.
    `control` maps the string of each control token to its id, `marks` those that a model writes inside its
    own turns (think and tool marks).
    """

    def __init__(
        self,
        prompt_ids: Callable[[str], list[int]],
        content_ids: Callable[[str], list[int]],
        control: Mapping[str, int],
        marks: frozenset[str],
    ) -> None:
        self._prompt_ids = prompt_ids
        self._content_ids = content_ids
        self._control = control
        self._any_control = _alternatives(control)
        self._marks = marks

    def set_aside(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """The messages with digits in place of each control string that an assistant's message holds as text,
        and the string they stand for: whatever control string a template then writes is its own.

        Think and tool marks in the content are marks, since that is where data keeps them; in the reasoning
        and in tool calls they are text like the others, for there the template writes the marks.
        """
        number = _unused_number(repr(messages))
        typed: dict[str, str] = {}

        def stand_in(match: re.Match[str]) -> str:
            digits = f"{number}{self._control[match[0]]:09}"
            typed[digits] = match[0]
            return digits

        def but_marks(match: re.Match[str]) -> str:
            return match[0] if match[0] in self._marks else stand_in(match)

        def quoted(message: Message) -> Message:
            if message.get("role") != "assistant":
                return message
            return {
                key: _replace(value, self._any_control, but_marks if key == "content" else stand_in)
                for key, value in message.items()
            }

        return [quoted(message) for message in messages], typed

    def encode(self, whole: str, turns: Sequence[range], typed: Mapping[str, str]) -> RenderedTurns:
        """Ids of the chat; every turn is encoded apart from what stands before it, as generation does.

        `turns` are ranges of characters of `whole`, `typed` is as `set_aside` gave it.
        """
        stand_ins = _alternatives(typed)

        def restored(text: str) -> str:
            return stand_ins.sub(lambda match: typed[match[0]], text)

        ids: list[int] = []
        ranges: list[range] = []
        position = 0
        for turn in turns:
            ids += self._between(whole[:position], restored(whole[position : turn.start]))
            first = len(ids)
            for text, mark in self._split(whole[turn.start : turn.stop]):
                ids += self._content_ids(restored(text))
                ids += [self._control[mark]] if mark else []
            ranges.append(range(first, len(ids)))
            position = turn.stop
        ids += self._between(whole[:position], restored(whole[position:]))
        return RenderedTurns(np.asarray(ids, np.int32), tuple(ranges))

    def _between(self, before: str, text: str) -> list[int]:
        """Ids of what the template puts between turns, as they are behind the control token before it."""
        mark = next((m for m in self._control if before.endswith(m)), None) if before else None
        if not text or mark is None:
            return self._prompt_ids(text) if text else []
        ids = self._prompt_ids(mark + text)
        return ids[ids.index(self._control[mark]) + 1 :]

    def _split(self, text: str) -> list[tuple[str, str]]:
        """Stretches of text in order, each with the control string behind it; "" behind the last."""
        parts: list[tuple[str, str]] = []
        position = 0
        for match in self._any_control.finditer(text):
            parts.append((text[position : match.start()], match[0]))
            position = match.end()
        return [*parts, (text[position:], "")]


def _unused_number(text: str) -> str:
    """Ten digits that `text` does not hold. They stay what they are in any template: cased, trimmed, in JSON.

    All of them differ, so the number cannot overlap itself and is found again among other digits.
    """
    return next(number for digits in permutations("0123456789") if (number := "".join(digits)) not in text)


def _replace(value: Any, pattern: re.Pattern[str], replacement: Callable[[re.Match[str]], str]) -> Any:
    """A JSON value with the matches in all its strings replaced."""
    if isinstance(value, str):
        return pattern.sub(replacement, value)
    if isinstance(value, Mapping):
        pairs = ((_replace(k, pattern, replacement), v) for k, v in value.items())
        return {key: _replace(inner, pattern, replacement) for key, inner in pairs}
    if isinstance(value, list | tuple):
        return [_replace(inner, pattern, replacement) for inner in value]
    return value


def _alternatives(strings: Iterable[str]) -> re.Pattern[str]:
    # The longest first; a pattern without alternatives must match nothing.
    ordered = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def end_strings(control: Mapping[str, int], ids: Sequence[int], where: str) -> list[str]:
    """The strings of the tokens that end a turn. Raises ConfigError when there is none."""
    ends = [text for text, index in control.items() if index in ids]
    if not ends:
        raise ConfigError(
            f"{where}: no token plays the role 'end_of_turn', so turns cannot be told apart; name one under "
            "roles in the configuration"
        )
    return ends
