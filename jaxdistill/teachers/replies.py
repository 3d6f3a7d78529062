"""Nothing bad is believed: a reply becomes arrays, or the reason why it does not.

What is caught, and by what:
- too few or too many results or entries, values moved against their ids, rows in another order: the number
  of results, the length of every list, `prompt_tokens`, and the echo of the ids sent;
- null, NaN, an infinity, a positive value, a number no softmax gives: the range of every value;
- values of another position or another row beside the right ids: only where top-k is asked for. The token's
  own value must then equal its entry in the list of its position, or lie below all of that list; so must
  the end of turn's, which is also the token's own where the token is the end of turn;
- top entries that are no distribution: descending, distinct ids of the vocabulary, a sum of at most 1.
Without top-k, values that stand beside the right ids cannot be told from others; nor can two results that
changed places, where the responses and the prompts' lengths and last tokens are the same. The canary
(`identity.py`) that goes with every request then still proves which model answered.

Letters: S response tokens (at least one), K top-k, E entries of a list, M positions of a table.
"""

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from reprlib import Repr
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.records import Unscored
from jaxdistill.teachers.checks import Asked, ScoringRow

ROUNDING = 1e-4  # nats by which two values that must agree may differ, and by which one may exceed 0
MASS_ROUNDING = 1e-2  # of a sum of probabilities: a server may round each of them to bfloat16
LEAST = -1e4  # nats; below it lie the stand-ins for "impossible" that some programs write, -1e9 or -3.4e38
_SHORT = Repr(maxstring=80, maxother=80, maxlist=4, maxdict=4, maxlevel=4)  # values that messages repeat


@dataclass(frozen=True)
class RowScores:
    """What a reply says about one row; see `records.TeacherScores` for the fields."""

    logprobs: Float32[np.ndarray, " S"]
    weight_version: str
    topk_ids: Int32[np.ndarray, "S K"] | None = None
    topk_logprobs: Float32[np.ndarray, "S K"] | None = None
    end_logprobs: Float32[np.ndarray, " S1"] | None = None


class _Unbelievable(Exception):
    """Why a row is not believed; never leaves this module."""

    def __init__(self, where: str, got: str, expected: str):
        super().__init__(f"{where + ': ' if where else ''}got {got}, expected {expected}")


def read_reply(
    body: Any, rows: Sequence[ScoringRow], asked: Asked, vocab_size: int
) -> list[RowScores | Unscored]:
    """Check the reply to `scoring_request(rows, asked)`; each row's scores, or why it has none.

    Values above 0 by no more than rounding become 0. Never raises for what a reply holds.
    """
    if not isinstance(body, list) or len(body) != len(rows):
        got = f"{len(body)} results" if isinstance(body, list) else _shown(body)
        why = f"reply: got {got}, expected a list of {len(rows)} results, one for each row sent"
        return [Unscored("bad_reply", f"{row.label}: {why}") for row in rows]
    return [_believed(result, row, asked, vocab_size) for result, row in zip(body, rows, strict=True)]


def _believed(result: Any, row: ScoringRow, asked: Asked, vocab_size: int) -> RowScores | Unscored:
    try:
        return _read_row(result, row, asked, vocab_size)
    except _Unbelievable as why:
        return Unscored("bad_reply", f"{row.label}: {why}")


def _read_row(result: Any, row: ScoringRow, asked: Asked, vocab_size: int) -> RowScores:
    meta = result.get("meta_info") if isinstance(result, dict) else None
    if not isinstance(meta, dict):
        raise _Unbelievable("", _shown(result), "an object with meta_info")
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise _Unbelievable("", f"an aborted row ({_shown(finish.get('message'))})", "a scored one")
    if meta.get("prompt_tokens", len(row)) != len(row):
        raise _Unbelievable(
            "", f"prompt_tokens {_shown(meta['prompt_tokens'])}", f"{len(row)}, the tokens sent"
        )
    version = meta.get("weight_version", "")
    if not isinstance(version, str):
        raise _Unbelievable("", f"weight_version {_shown(version)}", "a string")
    logprobs = _own(meta, row, vocab_size)
    end = None if asked.end_token is None else _end(meta, row, asked.end_token, logprobs)
    if not asked.top_k:
        return RowScores(logprobs, version, end_logprobs=end)
    ids, values = _top(meta, row, asked.top_k)
    _check_distributions(ids, values, vocab_size)
    _check_entry("log-probability", row.response, logprobs, ids, values)
    if end is not None:
        last_ids, last_values = _top_listed(_entries(meta, "output_top_logprobs", 1), asked.top_k)
        tables = np.concatenate([ids, last_ids]), np.concatenate([values, last_values])
        _check_entry(
            "the end of turn's log-probability", np.full(len(end), asked.end_token, np.int32), end, *tables
        )
    return RowScores(logprobs, version, ids, values, end)


def _own(meta: Mapping[str, Any], row: ScoringRow, vocab_size: int) -> Float32[np.ndarray, " S"]:
    """The log-probabilities of the response's own tokens."""
    entries = _entries(meta, "input_token_logprobs", len(row.response) + 1)
    values, ids = _columns(entries, "input_token_logprobs")
    echoed = [int(row.prompt[-1]), *row.response.tolist()]
    if ids != echoed:
        pairs = enumerate(zip(ids, echoed, strict=True), start=-1)
        wrong = [(at, got, sent) for at, (got, sent) in pairs if not _echoes(got, sent, vocab_size)]
        if wrong:
            position, got, sent = wrong[0]
            raise _Unbelievable(_place(position), f"token id {_shown(got)}", f"{sent}, the id sent")
    if values[0] is not None:
        raise _Unbelievable("", _shown(values[0]), "null before the first response token")
    return _checked(values[1:], "log-probability")


def _echoes(got: Any, sent: int, vocab_size: int) -> bool:
    """Whether a server means the id sent: SGLang writes 0 for the last id of the vocabulary, which it takes
    for a stand-in of an image; the value beside it is the right one."""
    return got == sent or (got == 0 and sent == vocab_size - 1)


def _end(
    meta: Mapping[str, Any], row: ScoringRow, end: int, logprobs: Float32[np.ndarray, " S"]
) -> Float32[np.ndarray, " S1"]:
    """log p(end of turn) before each response token, and after the last."""
    before = _entries(meta, "input_token_ids_logprobs", len(row.response) + 1)
    after = _entries(meta, "output_token_ids_logprobs", 1)
    if before[0] is not None:
        raise _Unbelievable(
            "input_token_ids_logprobs", _shown(before[0]), "null before the first response token"
        )
    name = "a list of the one id asked for"
    values, ids = _columns(_flattened([*before[1:], *after], 1, name), name)
    wrong = next((i for i, got in enumerate(ids) if got != end), None)
    if wrong is not None:
        raise _Unbelievable(_place(wrong), f"chosen id {_shown(ids[wrong])}", f"{end}, the end of turn's")
    found = _checked(values, "the end of turn's log-probability")
    ended = np.flatnonzero(row.response == end)
    apart = np.flatnonzero(np.abs(found[ended] - logprobs[ended]) > ROUNDING)
    if len(apart):
        position = int(ended[apart[0]])
        raise _Unbelievable(
            _place(position),
            f"the end of turn's log-probability {found[position]:g}",
            f"{logprobs[position]:g}, as for the token, which is the end of turn",
        )
    return found


def _top(
    meta: Mapping[str, Any], row: ScoringRow, k: int
) -> tuple[Int32[np.ndarray, "S K"], Float32[np.ndarray, "S K"]]:
    """The most likely tokens before each response token, from whichever form came."""
    if "input_top_logprobs_shape" in meta:
        return _top_flat(meta, len(row.response), k)
    entries = _entries(meta, "input_top_logprobs", len(row.response) + 1)
    if entries[0] is not None:
        raise _Unbelievable("input_top_logprobs", _shown(entries[0]), "null before the first response token")
    return _top_listed(entries[1:], k)


def _top_listed(lists: list[Any], k: int) -> tuple[Int32[np.ndarray, "M K"], Float32[np.ndarray, "M K"]]:
    """A list of `k` triples for each position, as two tables."""
    name = f"a list of {k} top entries"
    values, ids = _columns(_flattened(lists, k, name), name)
    return _whole(ids).reshape(-1, k), _checked(values, "top log-probability", k).reshape(-1, k)


def _top_flat(
    meta: Mapping[str, Any], positions: int, k: int
) -> tuple[Int32[np.ndarray, "S K"], Float32[np.ndarray, "S K"]]:
    shape, prefix = meta["input_top_logprobs_shape"], meta.get("input_top_logprobs_null_prefix")
    # Some releases count the position before the response as a row of the shape, though it has no numbers.
    if prefix != 1 or shape not in ([positions, k], [positions + 1, k]):
        raise _Unbelievable(
            "flat top log-probabilities",
            f"shape {_shown(shape)} after {_shown(prefix)} nulls",
            f"[{positions}, {k}] after 1",
        )
    count = positions * k
    if "input_top_logprobs_val_flat_b64" in meta:
        found = _decoded(meta, "val", "float32", count)
        ids = _decoded(meta, "idx", "int32", count)
        values = _in_range(found, found, "top log-probability", k)
    else:
        values = _checked(_entries(meta, "input_top_logprobs_val_flat", count), "top log-probability", k)
        ids = _whole(_entries(meta, "input_top_logprobs_idx_flat", count))
    return ids.reshape(positions, k), values.reshape(positions, k)


def _decoded(meta: Mapping[str, Any], part: str, dtype: str, count: int) -> np.ndarray:
    """Little-endian numbers from base64."""
    key = f"input_top_logprobs_{part}_flat_b64"
    text, said = meta.get(key), meta.get(f"{key}_dtype")
    if said != dtype or not isinstance(text, str):
        raise _Unbelievable(key, f"{_shown(text)} of type {_shown(said)}", f"base64 of {dtype}")
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise _Unbelievable(key, f"what is not base64 ({error})", f"base64 of {dtype}") from error
    if len(data) != 4 * count:
        raise _Unbelievable(key, f"{len(data)} bytes", f"{4 * count}, for {count} numbers of type {dtype}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _check_distributions(
    ids: Int32[np.ndarray, "M K"], values: Float32[np.ndarray, "M K"], vocab_size: int
) -> None:
    """Each row of a table: ids of the vocabulary, none twice, descending, with a mass of at most 1."""
    k = ids.shape[1]
    if ids.min() < 0 or ids.max() >= vocab_size:
        place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise _Unbelievable(
            _place(place // k, place % k),
            f"token id {ids.flat[place]}",
            f"one in [0, {vocab_size}), the vocabulary of teacher.tokenizer",
        )
    rising = values[:, 1:] - values[:, :-1] > ROUNDING
    if rising.any():
        position, rank = map(int, np.argwhere(rising)[0] + (0, 1))
        raise _Unbelievable(
            _place(position, rank),
            f"top log-probability {values[position, rank]:g}",
            f"at most {values[position, rank - 1]:g}, the one before",
        )
    ranked = np.sort(ids, axis=1)
    twice = ranked[:, 1:] == ranked[:, :-1]
    if twice.any():
        position, rank = map(int, np.argwhere(twice)[0])
        raise _Unbelievable(_place(position), f"token id {ranked[position, rank]} twice", "each id once")
    mass = np.exp(values).sum(axis=1)
    if mass.max() > 1 + MASS_ROUNDING:
        position = int(mass.argmax())
        raise _Unbelievable(_place(position), f"a top-{k} mass of {mass[position]:g}", "at most 1")


def _check_entry(
    what: str,
    tokens: Int32[np.ndarray, " M"],
    logprobs: Float32[np.ndarray, " M"],
    ids: Int32[np.ndarray, "M K"],
    values: Float32[np.ndarray, "M K"],
) -> None:
    """A token's value against the list of its position: its entry's, or no more than the list's last."""
    here = ids == tokens[:, None]
    listed = here.any(axis=1)
    entry = values[np.arange(len(tokens)), np.where(listed, here.argmax(axis=1), ids.shape[1] - 1)]
    over = logprobs - entry
    bad = np.flatnonzero(np.where(listed, np.abs(over), over) > ROUNDING)
    if len(bad):
        position = int(bad[0])
        expected = (
            f"{entry[position]:g}, its entry among the top {ids.shape[1]}"
            if listed[position]
            else f"at most {entry[position]:g}, the last of the top {ids.shape[1]}, where the id is not"
        )
        raise _Unbelievable(
            _place(position), f"{what} {logprobs[position]:g} of token id {tokens[position]}", expected
        )


def _entries(meta: Mapping[str, Any], key: str, count: int) -> list[Any]:
    """The list under `key`, which must have `count` entries."""
    found = meta.get(key)
    if not isinstance(found, list):
        raise _Unbelievable(key, _shown(found), f"a list of {count}")
    if len(found) != count:
        raise _Unbelievable(key, f"{len(found)} entries", str(count))
    return found


def _flattened(lists: list[Any], count: int, name: str) -> list[Any]:
    """The entries of all lists, each of which must have `count`."""
    if {type(one) for one in lists} - {list} or set(map(len, lists)) - {count}:
        position = next(i for i, one in enumerate(lists) if type(one) is not list or len(one) != count)
        raise _Unbelievable(_place(position), _shown(lists[position]), name)
    return list(chain.from_iterable(lists))


def _columns(triples: list[Any], where: str) -> tuple[list[Any], list[Any]]:
    """Values and ids of `[value, id, text]` triples, taken apart without a Python step for each."""
    if set(map(type, triples)) - {list} or set(map(len, triples)) - {3}:
        bad = next(one for one in triples if type(one) is not list or len(one) != 3)
        raise _Unbelievable(where, _shown(bad), "[log-probability, token id, text]")
    flat = list(chain.from_iterable(triples))
    return flat[0::3], flat[1::3]


def _checked(values: list[Any], what: str, k: int = 1) -> Float32[np.ndarray, " E"]:
    """A list of JSON numbers as an array, `k` a position; null, words and truth values are refused."""
    if set(map(type, values)) - {float, int}:
        bad = next(i for i, value in enumerate(values) if type(value) not in (float, int))
        raise _Unbelievable(_rank(bad, k), f"{what} {_shown(values[bad])}", "a number")
    try:
        array = np.array(values, np.float64)
    except OverflowError:  # an integer of hundreds of digits, which is named below
        array = np.array([np.nan])
    return _in_range(array, values, what, k).astype(np.float32)


def _in_range(array: np.ndarray, values: Sequence[Any] | np.ndarray, what: str, k: int) -> np.ndarray:
    """`array` with rounding above 0 cut off; `values` are what it was made of, for a message.

    NaN fails every comparison, and so these.
    """
    if not (array.min() >= LEAST and array.max() <= ROUNDING):
        bad = next(i for i, value in enumerate(values) if not LEAST <= value <= ROUNDING)
        expected = f"a finite number in [{LEAST:g}, 0]"
        raise _Unbelievable(_rank(bad, k), f"{what} {_shown(values[bad])}", expected)
    return np.minimum(array, 0)


def _whole(ids: list[Any]) -> Int32[np.ndarray, " E"]:
    """A list of JSON integers as ids; what does not fit 32 bits becomes -1, outside any vocabulary."""
    if set(map(type, ids)) - {int}:
        bad = next(i for i in ids if type(i) is not int)
        raise _Unbelievable("top entries", f"token id {_shown(bad)}", "an integer")
    if max(ids) >= 2**31 or min(ids) < 0:
        ids = [i if 0 <= i < 2**31 else -1 for i in ids]
    return np.array(ids, np.int32)


def _place(position: int, rank: int | None = None) -> str:
    """A response position (-1 is the last prompt token's), and a place in its list of top entries."""
    return f"response position {position}" + ("" if rank is None else f", rank {rank}")


def _rank(index: int, k: int) -> str:
    """The place of entry `index` where each position has `k`."""
    return _place(index) if k == 1 else _place(index // k, index % k)


def _shown(value: Any) -> str:
    """`value` for a message, cut to a length that stays readable."""
    return _SHORT.repr(float(value) if isinstance(value, np.floating) else value)
