"""Nothing bad is sent, nothing bad is believed: the checks around one scoring request.

A token id outside the vocabulary or an empty row kills a genuine server, or returns another row's
numbers; a reply that is short, shifted or not finite would train the student on noise.

Letters: P prompt tokens, S response tokens (at least one), N = P + S.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.errors import TeacherContractError

ROUNDING = 1e-4  # a log-probability this far above 0 is a rounding error, and taken as 0


@dataclass(frozen=True)
class ScoringRow:
    """One prompt and response to score; `number` is the rollout's place in the batch."""

    number: int
    prompt: Int32[np.ndarray, " P"]
    response: Int32[np.ndarray, " S"]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def check_row(row: ScoringRow, vocab_size: int) -> None:
    """Raise `TeacherContractError` for a row that must not be sent."""
    if not len(row.prompt):
        raise TeacherContractError(
            f"row {row.number}: the teacher's chat template rendered an empty prompt, expected at least one "
            "token before the response; check teacher.tokenizer and its template"
        )
    ids = np.concatenate([row.prompt, row.response])
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise TeacherContractError(
            f"row {row.number}, position {bad[0]}: got token id {ids[bad[0]]}, expected one in "
            f"[0, {vocab_size}); not sent, check that teacher.tokenizer is the served model's own"
        )


def group_rows(rows: Sequence[ScoringRow], max_tokens: int) -> list[list[ScoringRow]]:
    """Cut the rows, in order, into groups of at most `max_tokens` tokens (a longer row stands alone).

    The order keeps the samples of one prompt together, where the server's prefix cache serves them.
    """
    groups: list[list[ScoringRow]] = []
    room = 0
    for row in rows:
        if not groups or len(row) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(row)
        room -= len(row)
    return groups


def scoring_request(rows: Sequence[ScoringRow]) -> dict[str, Any]:
    """The `/generate` body that scores the responses of `rows`.

    The first entry returned is the last prompt token's and is always null, hence the start at P - 1;
    a start later than 0 also lets the server reuse the prompt's cache for all samples of it.
    """
    return {
        "input_ids": [[*row.prompt.tolist(), *row.response.tolist()] for row in rows],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": [len(row.prompt) - 1 for row in rows],
    }


def read_scores(reply: Any, rows: Sequence[ScoringRow]) -> list[tuple[Float32[np.ndarray, " S"], str]]:
    """Check the reply to `scoring_request(rows)`; return (logprobs, weight version) of each row.

    Raises `TeacherContractError` naming the row, the position, what was got and what was expected.
    """
    if not isinstance(reply, list):
        _refuse(None, f"got {_shown(reply)}", f"a list of {len(rows)} results")
    if len(reply) != len(rows):
        _refuse(None, f"got {len(reply)} results", f"{len(rows)}, one for each row sent")
    return [_read_row(result, row) for result, row in zip(reply, rows, strict=True)]


def _read_row(result: Any, row: ScoringRow) -> tuple[Float32[np.ndarray, " S"], str]:
    meta = result.get("meta_info") if isinstance(result, dict) else None
    if not isinstance(meta, dict):
        _refuse(row, f"got {_shown(result)}", "an object with meta_info")
    entries = meta.get("input_token_logprobs")
    if not isinstance(entries, list):
        _refuse(row, f"got input_token_logprobs {_shown(entries)}", "a list")
    size = len(row.response)
    if len(entries) != size + 1:
        _refuse(row, f"got {len(entries)} log-probabilities", f"{size + 1} (null, then one a response token)")
    if meta.get("prompt_tokens", len(row)) != len(row):
        _refuse(row, f"got prompt_tokens {meta['prompt_tokens']}", f"{len(row)}, the tokens sent")
    version = meta.get("weight_version", "")
    if not isinstance(version, str):
        _refuse(row, f"got weight_version {_shown(version)}", "a string")
    return _read_entries(entries, row), version


def _read_entries(entries: Sequence[Any], row: ScoringRow) -> Float32[np.ndarray, " S"]:
    echoed = [int(row.prompt[-1]), *row.response.tolist()]
    values = np.zeros(len(row.response), np.float32)
    for position, (entry, token) in enumerate(zip(entries, echoed, strict=True), start=-1):
        if not isinstance(entry, list) or len(entry) != 3:
            _refuse(row, f"got {_shown(entry)}", "[log-probability, token id, text]", position)
        value, got, _ = entry
        if got != token:
            _refuse(row, f"got token id {_shown(got)}", f"{token}, the id sent", position)
        if position < 0:
            if value is not None:
                _refuse(row, f"got {_shown(value)}", "null before the first response token", position)
            continue
        if type(value) not in (float, int) or not math.isfinite(value) or value > ROUNDING:
            _refuse(row, f"got log-probability {_shown(value)}", "a finite number <= 0", position)
        values[position] = min(value, 0.0)
    return values


def _refuse(row: ScoringRow | None, got: str, expected: str, position: int | None = None) -> NoReturn:
    where = "reply" if row is None else f"row {row.number}"
    if position is not None:
        where += f", response position {position}"
    raise TeacherContractError(f"{where}: {got}, expected {expected}; nothing of this reply was used")


def _shown(value: Any) -> str:
    """`value` for a message, cut to a length that stays readable."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
