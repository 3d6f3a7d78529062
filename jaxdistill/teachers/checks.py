"""Nothing bad is sent: what one scoring request may hold, and how it is written.

A token id outside the vocabulary, more top entries than there are ids, or an empty row kills a genuine
server or returns another row's numbers; a row beyond the context is refused together with its whole
request. So all of that is settled here, before anything leaves. What is said of a row does not name it: the
caller knows it by its place in the data, where it can be changed.

Letters: P prompt tokens, S response tokens (at least one), K top-k.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Unscored

# An entry of a list, `[-0.00024637524620629847,151936,null],`, takes about 40 characters; a row's other
# fields about 1,500. What a server writes more generously still fits, a reply that never ends does not.
BYTES_AN_ENTRY = 64
BYTES_A_ROW = 8192


@dataclass(frozen=True)
class Asked:
    """What is asked for at each position beside the log-probability of the token itself: the `top_k` most
    likely tokens, and the log-probability of `end_token` (an id)."""

    top_k: int = 0
    end_token: int | None = None


OWN_ONLY = Asked()


@dataclass(frozen=True)
class ScoringRow:
    """One prompt and response to score; `number` is the rollout's place in the batch, None for the canary."""

    number: int | None
    prompt: Int32[np.ndarray, " P"]
    response: Int32[np.ndarray, " S"]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def label(self) -> str:
        """What messages call this row."""
        return "canary" if self.number is None else f"row {self.number}"


def check_asked(asked: Asked, vocab_size: int) -> None:
    """Raise `ConfigError` for extras that no server with this vocabulary can give."""
    if asked.top_k > vocab_size:
        raise ConfigError(
            f"teacher.top_k is {asked.top_k}, expected at most the vocabulary's {vocab_size}; set it lower"
        )


def check_row(row: ScoringRow, vocab_size: int) -> None:
    """Raise `TeacherContractError` for a row that must not be sent: without prompt or response, or with an
    id outside the vocabulary."""
    check_prompt(row.prompt)
    if not len(row.response):
        raise TeacherContractError("got no response token, expected at least one; not sent")
    check_ids(np.concatenate([row.prompt, row.response]), vocab_size)


def check_prompt(prompt: Int32[np.ndarray, " P"]) -> None:
    """Raise `TeacherContractError` for an empty prompt, which is the chat template's doing."""
    if not len(prompt):
        raise TeacherContractError(
            "the teacher's chat template rendered an empty prompt, expected at least one token before the "
            "response; not sent, check teacher.tokenizer and its template"
        )


def check_ids(ids: Int32[np.ndarray, " _"], vocab_size: int) -> None:
    """Raise `TeacherContractError` for an id outside the vocabulary."""
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise TeacherContractError(
            f"position {bad[0]}: got token id {ids[bad[0]]}, expected one in "
            f"[0, {vocab_size}); not sent, check that teacher.tokenizer is the served model's own"
        )


def fit_row(
    row: ScoringRow, longest: int, too_long: Literal["mask", "truncate", "stop"]
) -> ScoringRow | Unscored:
    """The row as it may be sent to a server that reads `longest` tokens at most.

    A longer one is left out ("mask"), cut to the beginning of its response ("truncate"; left out where not
    one response token fits), or raises `TeacherContractError` ("stop").
    """
    if len(row) <= longest:
        return row
    room = longest - len(row.prompt)
    if too_long == "truncate" and room > 0:
        return replace(row, response=row.response[:room])
    what = (
        f"got {len(row.prompt)} prompt and {len(row.response)} response tokens, expected at most {longest} "
        "together, which is what the teacher reads"
    )
    if too_long == "stop":
        raise TeacherContractError(
            f"{what}; serve it with a longer context, lower rollout.max_new_tokens, or set teacher.too_long"
        )
    return Unscored("too_long", what)


def group_rows[Row: Sized](rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Cut the rows, in order, into groups of at most `max_tokens` tokens (a longer row stands alone).

    The order keeps the samples of one prompt together, where the server's prefix cache serves them.
    """
    groups: list[list[Row]] = []
    room = 0
    for row in rows:
        if not groups or len(row) > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(row)
        room -= len(row)
    return groups


def scoring_request(rows: Sequence[ScoringRow], asked: Asked = OWN_ONLY) -> dict[str, Any]:
    """The `/generate` body that scores the responses of `rows`.

    The first entry returned is the last prompt token's and is always null, hence the start at P - 1;
    a start later than 0 also lets the server reuse the prompt's cache for all samples of it. Top entries
    are asked for in the flat base64 form too: servers that do not have it ignore the two fields.
    """
    body: dict[str, Any] = {
        "input_ids": [[*row.prompt.tolist(), *row.response.tolist()] for row in rows],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": [len(row.prompt) - 1 for row in rows],
    }
    if asked.top_k:
        body["top_logprobs_num"] = asked.top_k
        body["return_flat_raw_top_logprobs"] = True
        body["return_flat_raw_top_logprobs_b64"] = True
    if asked.end_token is not None:
        body["token_ids_logprob"] = [asked.end_token]
    return body


def largest_reply(rows: Sequence[ScoringRow], asked: Asked) -> int:
    """Most bytes that a sound reply to `scoring_request(rows, asked)` has, in its longest form."""
    entries = 1 + asked.top_k + (asked.end_token is not None)
    # Each list also has an entry before the response, and the optional ones have one after it.
    return sum(BYTES_A_ROW + (len(row.response) + 2) * entries * BYTES_AN_ENTRY for row in rows)
