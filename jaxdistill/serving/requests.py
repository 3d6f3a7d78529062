"""JSON body of `POST /generate` -> validated rows.

Everything that is known to crash or poison a genuine server (ids outside the vocabulary, empty rows
in a batch, k above the vocabulary, negative starts) is refused here with a 400 before it is queued.

Letters: N prompt tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np

from jaxdistill.serving.protocol import (
    Limits,
    RefusedRequest,
    ReplyForm,
    Row,
    refused_key,
    refused_type,
    refused_value,
)

DEFAULT_MAX_NEW_TOKENS = 128  # the genuine server's default
MAX_SEED = 2**32
# What one request may ask for. A few bytes can ask for the whole vocabulary at every position of thousands
# of rows: without these the reply, and not the body, would take the memory.
MOST_ROWS = 2**14
MOST_NUMBERS = 2**23  # tokens read and written, and top and chosen log-probabilities reported
MOST_STOP_IDS = 64  # each set of them is a program of its own

# Request fields that change what a reply means and are not implemented: ignoring them, as unknown
# fields are ignored, would answer another question than the one asked.
UNSUPPORTED_FIELDS = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "stream",
    "return_hidden_states",
    "lora_path",
    "session_params",
    "custom_logit_processor",
)
SUPPORTED_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "stop_token_ids",
    "ignore_eos",
    "sampling_seed",
)
# Known sampling parameters that are accepted only at the value that changes nothing.
NEUTRAL_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "stop": (None, [], ""),
    "stop_regex": (None, [], ""),
    "top_k": (None, -1, 1 << 30),
    "min_p": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "min_new_tokens": (None, 0),
    "n": (None, 1),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True, False),
    "no_stop_trim": (None, False),
    "logit_bias": (None, {}),
    "custom_params": (None, {}),
}


def parse_generate(body: Any, limits: Limits, default_stop: frozenset[int]) -> tuple[list[Row], ReplyForm]:
    """Validate a `/generate` body; return its rows and how the reply is to be written.

    `default_stop` are the tokens generation stops at unless `ignore_eos` is set. Raises
    `RefusedRequest` naming the field, the row and the value.
    """
    if not isinstance(body, dict):
        raise refused_type("body", f"must be a JSON object; got {_kind(body)}")
    for field in UNSUPPORTED_FIELDS:
        if body.get(field):
            raise refused_value(f"{field} is not supported by this server; leave it out")
    prompts, batched = _prompts(body, limits)

    def column[T](field: str, default: Any, check: Callable[[Any, int], T]) -> list[T]:
        return _checked(_per_row(field, body.get(field), default, len(prompts), batched), check)

    columns = zip(
        prompts,
        column("sampling_params", {}, lambda value, row: _sampling(value, row, limits, default_stop)),
        column("return_logprob", False, lambda value, row: _flag("return_logprob", value, row)),
        column("logprob_start_len", -1, lambda value, _: _integer("logprob_start_len", value)),
        column("top_logprobs_num", 0, lambda value, _: _top_k(value, limits)),
        _checked(
            _chosen_rows(body.get("token_ids_logprob"), len(prompts), batched),
            lambda value, row: _chosen(value, row, limits),
        ),
        column("rid", None, _rid),
        strict=True,
    )
    rows = [_row(index, limits, *settings) for index, settings in enumerate(columns)]
    _check_size(rows)
    return rows, _reply_form(body, batched)


def _row(
    index: int,
    limits: Limits,
    ids: list[int],
    sampling: dict[str, Any],
    logprobs: bool,
    start: int,
    top_k: int,
    chosen: tuple[int, ...],
    rid: str | None,
) -> Row:
    """Check one row's settings against each other and the limits."""
    _check_length(index, len(ids), sampling["max_new_tokens"], limits)
    return Row(
        rid=uuid4().hex if rid is None else rid,
        ids=np.asarray(ids, dtype=np.int32),
        logprobs=logprobs,
        start=_start(start, len(ids)),
        top_k=top_k,
        chosen=chosen,
        **sampling,
    )


def _check_size(rows: Sequence[Row]) -> None:
    def numbers(row: Row) -> int:
        reported = len(row.ids) - row.first + max(row.max_new_tokens, 1) if row.logprobs else 0
        return len(row.ids) + row.max_new_tokens + reported * (row.top_k + len(row.chosen))

    asked = sum(map(numbers, rows))
    if asked > MOST_NUMBERS:
        raise refused_value(
            f"The request is too large: its tokens and the log-probabilities asked for are {asked} numbers, "
            f"and one request may have {MOST_NUMBERS}. Send fewer rows at once, or ask for a smaller top-k."
        )


def _reply_form(body: Mapping[str, Any], batched: bool) -> ReplyForm:
    def flag(field: str) -> bool:
        value = body.get(field)
        return _flag(field, False if value is None else value)

    form = ReplyForm(
        batched=batched,
        text=flag("return_text_in_logprobs"),
        flat=flag("return_flat_raw_top_logprobs"),
        base64=flag("return_flat_raw_top_logprobs_b64"),
    )
    if form.base64 and not form.flat:
        raise refused_value(
            "return_flat_raw_top_logprobs_b64 says how return_flat_raw_top_logprobs is written: set that too"
        )
    return form


def _prompts(body: Mapping[str, Any], limits: Limits) -> tuple[list[list[int]], bool]:
    """The prompts of a request, and whether it is a batch."""
    value = body.get("input_ids")
    if value is None:
        if body.get("text") is not None:
            raise refused_value("text prompts are not supported by this server; send input_ids.")
        raise refused_value("Either text, input_ids or input_embeds should be provided.")
    if not isinstance(value, list):
        raise refused_type("input_ids", f"must be list or null; got {_kind(value)}")
    if not value:
        raise refused_value("input_ids cannot be empty.")
    batched = isinstance(value[0], list)
    prompts = value if batched else [value]
    if len(prompts) > MOST_ROWS:
        raise refused_value(f"input_ids has {len(prompts)} rows, and one request may have {MOST_ROWS}.")
    for row, ids in enumerate(prompts):
        if not isinstance(ids, list):
            raise refused_type("input_ids", f"row {row} must be a list; got {_kind(ids)}")
        if not ids:
            raise refused_value(f"input_ids cannot be empty; row {row} of the batch is.")
        _check_ids("input_ids", ids, f" of row {row}", limits)
    return prompts, batched


def _check_ids(field: str, ids: Sequence[Any], where: str, limits: Limits) -> None:
    if not all(type(token) is int for token in ids):  # bool is an int to isinstance
        bad = next(token for token in ids if type(token) is not int)
        raise refused_type(field, f"contains non-int64 element: {bad!r} is {_kind(bad)}{where}")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        at, bad = next((i, t) for i, t in enumerate(ids) if not 0 <= t < limits.vocab_size)
        raise refused_value(
            f"{field} contains out-of-vocabulary token id {bad} at position {at}{where}; "
            f"valid range is [0, {limits.vocab_size})."
        )


def _check_length(row: int, length: int, new: int, limits: Limits) -> None:
    if length >= limits.context_length:
        raise refused_value(
            f"The input of row {row} ({length} tokens) is longer than the model's context length "
            f"({limits.context_length} tokens)."
        )
    if length + new > limits.context_length:
        raise refused_value(
            f"Requested token count exceeds the model's maximum context length of {limits.context_length} "
            f"tokens: row {row} has {length} input tokens and asks for {new} new ones."
        )


def _start(start: int, length: int) -> int:
    """-1 and the prompt's length both mean that no prompt position is reported."""
    if start < -1:
        raise refused_value(f"logprob_start_len must be -1 or at least 0, got {start}.")
    if start > length:
        raise refused_value(
            f"logprob_start_len={start} is higher than the number of input tokens {length}. "
            "Please use a smaller logprob_start_len."
        )
    return length if start == -1 else start


def _per_row(field: str, value: Any, default: Any, count: int, batched: bool) -> list[Any]:
    """A scalar for all rows, or in a batch a list with one entry a row; None entries are the default."""
    if isinstance(value, list):
        if not batched:
            raise refused_type(field, "is a list, but input_ids is a single prompt")
        if len(value) != count:
            raise refused_value(f"{field} has {len(value)} entries for a batch of {count} rows.")
        values = value
    else:
        values = [value] * count
    return [default if entry is None else entry for entry in values]


def _checked[T](values: Sequence[Any], check: Callable[[Any, int], T]) -> list[T]:
    """`check(value, row)` of every row's value; one that stands for all rows is checked once."""
    results: dict[int, T] = {}
    for row, value in enumerate(values):
        if id(value) not in results:
            results[id(value)] = check(value, row)
    return [results[id(value)] for value in values]


def _chosen_rows(value: Any, count: int, batched: bool) -> list[Any]:
    """`token_ids_logprob`: a flat list is for every row, in a batch a list of lists is per row."""
    if isinstance(value, list) and any(isinstance(entry, list) for entry in value):
        return _per_row("token_ids_logprob", value, [], count, batched)
    return [[] if value is None else value] * count


def _chosen(value: Any, row: int, limits: Limits) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise refused_type("token_ids_logprob", f"must be a list of ids; got {_kind(value)} for row {row}")
    if value:
        _check_ids("token_ids_logprob", value, f" for row {row}", limits)
    if len(value) > limits.vocab_size:
        raise refused_value(f"token_ids_logprob has {len(value)} ids, more than the vocabulary.")
    return tuple(value)


def _top_k(value: Any, limits: Limits) -> int:
    top_k = _integer("top_logprobs_num", value)
    if not 0 <= top_k <= limits.vocab_size:
        raise refused_value(
            f"top_logprobs_num must be between 0 and the vocabulary size {limits.vocab_size}, got {top_k}."
        )
    return top_k


def _rid(value: Any, row: int) -> str | None:
    if not isinstance(value, str | None):
        raise refused_type("rid", f"must be a string; got {_kind(value)} for row {row}")
    return value


def _sampling(params: Any, row: int, limits: Limits, default_stop: frozenset[int]) -> dict[str, Any]:
    """The sampling fields of a `Row` from `sampling_params`."""
    if not isinstance(params, dict):
        raise refused_type("sampling_params", f"must be an object; got {_kind(params)} for row {row}")
    for key, value in params.items():
        if key in NEUTRAL_SAMPLING:
            if not any(type(value) is type(ok) and value == ok for ok in NEUTRAL_SAMPLING[key]):
                raise refused_value(
                    f"sampling_params.{key}={value!r} is not supported by this server; leave it out."
                )
        elif key not in SUPPORTED_SAMPLING:
            raise refused_key(key, (*SUPPORTED_SAMPLING, *NEUTRAL_SAMPLING))
    stop = _value(params, "stop_token_ids", [], _token_list(limits))
    if len(stop) > MOST_STOP_IDS:
        raise refused_value(f"stop_token_ids has {len(stop)} ids, and there may be {MOST_STOP_IDS}.")
    ignore_eos = _value(params, "ignore_eos", False, _flag)
    new = _value(params, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS, _integer)
    if new < 0:
        raise refused_value(f"max_new_tokens must be at least 0, got {new}.")
    seed = _value(params, "sampling_seed", None, _integer)
    if seed is not None and not 0 <= seed < MAX_SEED:
        raise refused_value(f"sampling_seed must be in [0, {MAX_SEED}), got {seed}.")
    return {
        "max_new_tokens": new,
        "temperature": _value(params, "temperature", 1.0, _temperature),
        "top_p": _value(params, "top_p", 1.0, _top_p),
        "stop_ids": frozenset(stop) | (frozenset() if ignore_eos else default_stop),
        "seed": seed,
    }


def _value(params: Mapping[str, Any], key: str, default: Any, check: Callable[[str, Any], Any]) -> Any:
    value = params.get(key)
    return default if value is None else check(f"sampling_params.{key}", value)


def _token_list(limits: Limits) -> Callable[[str, Any], list[int]]:
    def check(field: str, value: Any) -> list[int]:
        if not isinstance(value, list):
            raise refused_type(field, f"must be a list of ids; got {_kind(value)}")
        if value:
            _check_ids(field, value, "", limits)
        return value

    return check


def _flag(field: str, value: Any, row: int | None = None) -> bool:
    if not isinstance(value, bool):
        where = "" if row is None else f" for row {row}"
        raise refused_type(field, f"must be a bool; got {_kind(value)}{where}")
    return value


def _temperature(field: str, value: Any) -> float:
    number = _number(field, value)
    if not (math.isfinite(number) and number >= 0):
        raise refused_value(f"temperature must be a non-negative number, got {value}.")
    return number


def _top_p(field: str, value: Any) -> float:
    number = _number(field, value)
    if not 0 < number <= 1:
        raise refused_value(f"top_p must be in (0, 1], got {value}.")
    return number


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise refused_type(field, f"must be a number; got {_kind(value)}")
    return float(value)


def _integer(field: str, value: Any) -> int:
    if type(value) is not int:
        raise refused_type(field, f"must be an integer; got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__


def refused_json(error: ValueError) -> RefusedRequest:
    """A body that is not JSON at all."""
    return refused_type("body", f"JSON decode error: {error}")
