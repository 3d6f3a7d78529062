"""The records of the scoring server: what a valid request asks for, what the engine answers, and how
a refusal looks on the wire. Pure numpy; the HTTP side and the device side meet only here.

Letters: N prompt tokens, M new tokens, Q reported positions, K top-k, C chosen ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.errors import DataError

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    """What a request is checked against: ids lie in [0, vocab_size), lengths below context_length."""

    vocab_size: int
    context_length: int


@dataclass(frozen=True)
class Row:
    """One prompt of a request that passed validation.

    Log-probabilities are reported for the prompt positions after `start` (`start == N`: none) and
    for every new token; `logprobs` false means for none at all. `chosen` are ids whose
    log-probability is wanted at each of those positions. Generation ends at a token of `stop_ids`
    or after `max_new_tokens`; temperature 0 is greedy, `top_p` below 1 draws from the nucleus alone. `seed`
    None lets the engine choose.
    """

    rid: str
    ids: Int32[np.ndarray, " N"]
    logprobs: bool
    start: int
    top_k: int
    chosen: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: frozenset[int]
    seed: int | None

    @property
    def first(self) -> int:
        """The first position whose distribution is reported: the token after `start`."""
        return min(self.start + 1, len(self.ids))


@dataclass(frozen=True)
class ReplyForm:
    """How a request wants its reply written. `batched`: a list with one reply a row; `text`: every triple
    with its token's text; `flat`: the top-k of the prompt as flat arrays, with `base64` as bytes."""

    batched: bool
    text: bool
    flat: bool
    base64: bool


@dataclass(frozen=True)
class Statistics:
    """Natural-log probabilities at consecutive positions `first ... N + max(M, 1) - 1` of prompt and
    output together.

    With M = 0 the last position is the one after the prompt: its distribution is known although no
    token was drawn from it, and its `logprob` is NaN. Prompt positions are at temperature 1, output
    positions at the row's own (as the genuine server reports them).
    """

    logprob: Float32[np.ndarray, " Q"]
    topk_logprobs: Float32[np.ndarray, "Q K"]
    topk_ids: Int32[np.ndarray, "Q K"]
    chosen_logprobs: Float32[np.ndarray, "Q C"]


@dataclass(frozen=True)
class RowResult:
    """What the engine found for one `Row`. `output_ids` ends with the stop token if one was drawn;
    `statistics` is present where the row asked for log-probabilities."""

    output_ids: Int32[np.ndarray, " M"]
    stopped: bool
    statistics: Statistics | None


@runtime_checkable
class Engine(Protocol):
    """What the HTTP side needs from the device side. `run` is called from one thread at a time."""

    limits: Limits
    stop_ids: frozenset[int]

    def run(self, rows: Sequence[Row]) -> list[RowResult]:
        """Answer every row, in order."""
        ...


class RefusedRequest(DataError):
    """A request the server will not execute; `status` and `body` are the HTTP answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message}} if body is None else body
        self.headers = headers or {}


def refused_value(message: str) -> RefusedRequest:
    """A value outside what the model can do, in the shape genuine servers use for it."""
    return RefusedRequest(message)


def refused_type(field: str, message: str) -> RefusedRequest:
    """A body that does not have the request's form (the shape of a failed schema check)."""
    body = {
        "object": "error",
        "message": f"1 validation error:\n  {field}: {message}",
        "type": "Bad Request",
        "param": None,
        "code": 400,
    }
    return RefusedRequest(f"{field}: {message}", body=body)


def refused_key(key: str, expected: Sequence[str]) -> RefusedRequest:
    """An unknown sampling parameter (the shape of a failed struct decode)."""
    names = ", ".join(f"`{name}`" for name in expected)
    message = f"unknown field `{key}`, expected one of {names}"
    return RefusedRequest(message, body={"error": message})


def refused_for_now(message: str) -> RefusedRequest:
    """A request that may well be executed later: 503, with the time after which to try again."""
    body = {"object": "error", "message": message, "type": "503", "param": None, "code": 503}
    return RefusedRequest(message, status=503, body=body, headers={"Retry-After": str(RETRY_AFTER_S)})
