"""A teacher that writes: what is sent, and what of the reply is believed.

A request is rows to write and, as the last row, the canary to score: the reply carries its own proof of who
made it, as a scored one does (`identity`).

Letters: P prompt tokens, M new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from jaxdistill.errors import JaxDistillError, TeacherContractError
from jaxdistill.records import TokenSpans, Unscored
from jaxdistill.servers import Peer
from jaxdistill.teachers.checks import (
    BYTES_A_ROW,
    OWN_ONLY,
    ScoringRow,
    check_ids,
    check_prompt,
    largest_reply,
    scoring_request,
)

# A new token's id, and its text as JSON writes it: vocabularies hold runs of a hundred spaces, and a sign
# outside of ASCII may take six characters.
BYTES_A_NEW_TOKEN = 1024


@dataclass(frozen=True)
class Written:
    """A response of the teacher in its own tokens, the end of turn with them; `finished` is false where it
    was cut at the length limit and so has none."""

    response: TokenSpans
    finished: bool


@dataclass(frozen=True)
class WritingRow:
    """One prompt to be answered with at most `new` tokens, drawn from `seed`; `number` is its place in the
    batch."""

    number: int
    prompt: Int32[np.ndarray, " P"]
    new: int
    seed: int

    def __len__(self) -> int:
        return len(self.prompt) + self.new

    @property
    def label(self) -> str:
        """What messages call this row."""
        return f"row {self.number}"


def writing_row(
    number: int,
    prompt: Int32[np.ndarray, " P"],
    new: int,
    seed: int,
    *,
    longest: int,
    vocab_size: int,
    too_long: Literal["mask", "truncate", "stop"],
) -> WritingRow | Unscored:
    """The row as it may be sent to a server that reads `longest` tokens at most: it writes less where the
    prompt leaves less room.

    A prompt that leaves none is left out ("mask", and "truncate" too: a prompt is never cut), or raises
    `TeacherContractError` ("stop"). Whatever `too_long` says, so does a prompt that is empty or has an id
    outside the vocabulary: sent, such a row ends the server or its whole request. No message names the row:
    the caller knows it by its place in the data.
    """
    check_prompt(prompt)
    check_ids(prompt, vocab_size)
    room = longest - len(prompt)
    if room > 0:
        return WritingRow(number, prompt, min(new, room), seed)
    what = (
        f"got a prompt of {len(prompt)} teacher tokens, expected at most {longest - 1} of the {longest} that "
        "the teacher reads"
    )
    if too_long == "stop":
        raise TeacherContractError(
            f"{what}; serve it with a longer context, drop the prompt, or set teacher.too_long"
        )
    return Unscored("too_long", what)


def writing_request(
    rows: Sequence[WritingRow],
    canary: ScoringRow,
    *,
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    """The `/generate` body that lets the teacher answer `rows`, and scores the canary after them."""
    scored = scoring_request([canary])
    written = [
        {
            "max_new_tokens": row.new,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(stop_ids),
            "sampling_seed": row.seed,
        }
        for row in rows
    ]
    return {
        "input_ids": [*(row.prompt.tolist() for row in rows), *scored["input_ids"]],
        "sampling_params": [*written, scored["sampling_params"]],
        "return_logprob": [*(False for _ in rows), True],
        "logprob_start_len": [*(-1 for _ in rows), *scored["logprob_start_len"]],
    }


def largest_writing(rows: Sequence[WritingRow], canary: ScoringRow) -> int:
    """Most bytes that a sound reply to `writing_request` has."""
    return sum(BYTES_A_ROW + row.new * BYTES_A_NEW_TOKEN for row in rows) + largest_reply([canary], OWN_ONLY)


def read_written(
    peer: Peer, result: Any, row: WritingRow, vocab_size: int, endpoint: str
) -> tuple[Int32[np.ndarray, " M"], bool, str]:
    """One row's result: its new ids, whether it ended by itself, and the weight version that wrote it.

    Raises the peer's `contract` error for what does not answer the row, and its `unavailable` where the
    server gave the row up; both name the `endpoint`.
    """
    where = f"{peer.at(endpoint)}: {row.label}"

    def refused(got: str, expected: str) -> JaxDistillError:
        return peer.contract(
            f"{where}: got {got}, expected {expected}; the reply cannot be used, check that the server is an "
            "SGLang that returns output_ids"
        )

    result = result if isinstance(result, dict) else {}
    meta = result.get("meta_info")
    meta = meta if isinstance(meta, dict) else {}
    finish = meta.get("finish_reason")
    kind = finish.get("type") if isinstance(finish, dict) else None
    if kind == "abort":
        raise peer.unavailable(f"{where}: the server gave up writing it ({finish!r:.200}); try again later")
    if kind not in ("stop", "length"):
        raise refused(f"finish_reason {finish!r:.80}", "one of type stop or length")
    count = meta.get("prompt_tokens", len(row.prompt))
    if count != len(row.prompt):
        raise refused(f"prompt_tokens {count!r:.80}", f"{len(row.prompt)}, the tokens sent")
    ids = result.get("output_ids")
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        raise refused(f"output_ids {ids!r:.80}", f"a list of ids in [0, {vocab_size})")
    if len(ids) > row.new:
        raise refused(f"{len(ids)} new tokens", f"at most {row.new}")
    version = meta.get("weight_version", "")
    if not isinstance(version, str):
        raise refused(f"weight_version {version!r:.80}", "a string")
    return np.asarray(ids, np.int32), kind == "stop", version
