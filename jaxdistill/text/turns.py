"""A chat of several turns as one sequence of ids that says which of them the assistant wrote.

Letters: P ids of the chat.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Turn:
    """Where one assistant turn lies in the chat's text, in characters; and its message's own text."""

    start: int
    stop: int
    content: str


def find_turns(
    messages: Sequence[Message], render: Render, ends: Sequence[str], where: str, *, last_only: bool = False
) -> tuple[str, list[Turn]]:
    """The chat's text and its assistant turns (or the last of them alone), from renderings of the chat's
    beginnings.

    What a turn generates begins where the rendering of the messages before it, with a generation prompt,
    ends. It stops behind the last of the strings `ends` in the rendering up to the turn. Both beginnings
    must be beginnings of the whole chat too.

    Raises DataError, naming the turn, where the template writes a turn otherwise once others follow (as
    those do that leave earlier reasoning out): then no one sequence holds what each turn was generated from.
    """
    whole = render(messages, False)
    turns: list[Turn] = []
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
        content = messages[index].get("content")
        turns.append(Turn(len(opened), stop, content if isinstance(content, str) else ""))
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
        self._any_mark = _alternatives(marks)

    def encode(self, whole: str, turns: Sequence[Turn]) -> RenderedTurns:
        """Ids of the chat; every turn is encoded apart from what stands before it, as generation does."""
        ids: list[int] = []
        ranges: list[range] = []
        position = 0
        for turn in turns:
            ids += self._between(whole[:position], whole[position : turn.start])
            first = len(ids)
            ids += self._written(whole[turn.start : turn.stop], turn.content.strip())
            ranges.append(range(first, len(ids)))
            position = turn.stop
        ids += self._between(whole[:position], whole[position:])
        return RenderedTurns(np.asarray(ids, np.int32), tuple(ranges))

    def _between(self, before: str, text: str) -> list[int]:
        """Ids of what the template puts between turns, as they are behind the control token before it."""
        mark = next((m for m in self._control if before.endswith(m)), None) if before else None
        if not text or mark is None:
            return self._prompt_ids(text) if text else []
        ids = self._prompt_ids(mark + text)
        return ids[ids.index(self._control[mark]) + 1 :]

    def _written(self, text: str, content: str) -> list[int]:
        """Ids of one assistant turn. In the message's own words only think and tool marks are marks; any
        other control string there was typed as text, and stays text."""
        start, stop = self._place(text, content)
        parts = self._split(text[:start], self._any_control)
        parts += self._split(text[start:stop], self._any_mark)
        parts += self._split(text[stop:], self._any_control)
        ids: list[int] = []
        pending = ""
        for part, is_mark in parts:
            if not is_mark:
                pending += part  # what the template and the message wrote side by side is one text
                continue
            ids += [*self._content_ids(pending), self._control[part]]
            pending = ""
        return ids + self._content_ids(pending)

    def _place(self, text: str, content: str) -> tuple[int, int]:
        """Where the message's own words stand in the turn; an empty stretch at its end if they do not.

        A message "think" must not be found inside the template's <think>.
        """
        inside = {i for m in self._any_control.finditer(text) for i in range(m.start() + 1, m.end())}
        start = text.find(content) if content else -1
        while start in inside:
            start = text.find(content, start + 1)
        return (start, start + len(content)) if start >= 0 else (len(text), len(text))

    @staticmethod
    def _split(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
        """Stretches of `text` in order, and whether each is a match."""
        parts: list[tuple[str, bool]] = []
        position = 0
        for match in pattern.finditer(text):
            parts += [(text[position : match.start()], False), (match[0], True)]
            position = match.end()
        return [*parts, (text[position:], False)]


def _alternatives(strings: Mapping[str, int] | frozenset[str]) -> re.Pattern[str]:
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
