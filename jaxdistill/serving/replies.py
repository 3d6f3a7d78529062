"""Engine results -> JSON replies with the keys, nesting and order of the genuine server's.

Letters: N prompt tokens, M new tokens, Q reported positions, K top-k, C chosen ids.
"""

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jaxdistill.serving.protocol import Limits, ReplyForm, Row, RowResult, Statistics

Triple = list[Any]  # [logprob, token id, text or None]
Distribution = list[Triple] | None  # None where a position has nothing before it


def generate_reply(
    row: Row,
    result: RowResult,
    form: ReplyForm,
    *,
    text: Callable[[np.ndarray], str],
    token_texts: Sequence[str] | None,
    seconds: float,
    weight_version: str,
) -> dict[str, Any]:
    """The reply for one row: text, ids and `meta_info`.

    `token_texts` is the text of each id of the vocabulary, where the triples are to have it, and
    `seconds` the time since the request's arrival.
    """
    output = result.output_ids
    count = len(output)
    if result.stopped:
        finish: dict[str, Any] = {"type": "stop", "matched": int(output[-1])}
    else:
        finish = {"type": "length", "length": count}
    statistics = result.statistics
    meta = {
        "id": row.rid,
        "finish_reason": finish,
        "prompt_tokens": len(row.ids),
        "weight_version": weight_version,
        "num_retractions": 0,
        **({} if statistics is None else _logprob_fields(row, output, statistics, form, token_texts)),
        "reasoning_tokens": 0,
        "completion_tokens": count,
        "cached_tokens": 0,
        "weight_versions": [{"version": weight_version, "start": 0, "end": count}],
        "cached_tokens_details": None,
        "dp_rank": None,
        "e2e_latency": seconds,
        "response_sent_to_client_ts": time.time(),
    }
    return {"text": text(output), "output_ids": output.tolist(), "meta_info": meta}


def _logprob_fields(
    row: Row, output: np.ndarray, statistics: Statistics, form: ReplyForm, texts: Sequence[str] | None
) -> dict[str, Any]:
    """The log-probability lists; those that were not asked for are left out, key and all.

    A list over prompt positions begins with the entry of `row.start`, whose value is always null:
    the genuine server does not report the distribution that token came from.
    """
    inputs = len(row.ids) - row.first  # positions of the prompt among the reported ones
    values = statistics.logprob.tolist()
    ids = row.ids[row.start :].tolist()
    fields: dict[str, Any] = {
        "input_token_logprobs": _triples([None, *values[:inputs]] if ids else [], ids, texts),
        "output_token_logprobs": _triples(values[inputs : inputs + len(output)], output.tolist(), texts),
        "output_token_logprobs_length": len(output),
    }
    head: list[Distribution] = [None] if ids else []
    if row.top_k:
        logprobs, top = statistics.topk_logprobs, statistics.topk_ids
        if form.flat:
            fields |= _flat_top(logprobs[:inputs], top[:inputs], len(head), base64_form=form.base64)
        else:
            fields["input_top_logprobs"] = head + _distributions(logprobs[:inputs], top[:inputs], texts)
        fields["output_top_logprobs"] = _distributions(logprobs[inputs:], top[inputs:], texts)
    if row.chosen:
        asked = np.broadcast_to(np.asarray(row.chosen, np.int32), statistics.chosen_logprobs.shape)
        chosen = _distributions(statistics.chosen_logprobs, asked, texts)
        fields["input_token_ids_logprobs"] = head + chosen[:inputs]
        fields["output_token_ids_logprobs"] = chosen[inputs:]
    return fields


def _triples(
    logprobs: Sequence[float | None], ids: Sequence[int], texts: Sequence[str] | None
) -> list[Triple]:
    if texts is None:
        return [[value, token, None] for value, token in zip(logprobs, ids, strict=True)]
    return [[value, token, texts[token]] for value, token in zip(logprobs, ids, strict=True)]


def _distributions(
    logprobs: Float32[np.ndarray, "Q K"], ids: Int32[np.ndarray, "Q K"], texts: Sequence[str] | None
) -> list[Distribution]:
    return [
        _triples(values, tokens, texts)
        for values, tokens in zip(logprobs.tolist(), ids.tolist(), strict=True)
    ]


def _flat_top(
    logprobs: Float32[np.ndarray, "Q K"],
    ids: Int32[np.ndarray, "Q K"],
    null_prefix: int,
    *,
    base64_form: bool,
) -> dict[str, Any]:
    """The top-k of the prompt row after row, without the nulls before them and without texts."""

    def packed(numbers: np.ndarray, kind: str) -> str:
        return base64.b64encode(numbers.astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()

    if base64_form:
        fields: dict[str, Any] = {
            "input_top_logprobs_val_flat_b64": packed(logprobs, "float32"),
            "input_top_logprobs_idx_flat_b64": packed(ids, "int32"),
            "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_idx_flat_b64_dtype": "int32",
        }
    else:
        fields = {
            "input_top_logprobs_val_flat": logprobs.ravel().tolist(),
            "input_top_logprobs_idx_flat": ids.ravel().tolist(),
        }
    return fields | {
        "input_top_logprobs_shape": list(ids.shape),
        "input_top_logprobs_null_prefix": null_prefix,
    }


def model_info(path: str, config: Mapping[str, Any], weight_version: str) -> dict[str, Any]:
    """`GET /model_info`: what is served. `config` is the model folder's config.json."""
    return {
        "model_path": path,
        "served_model_name": path,
        "tokenizer_path": path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": weight_version,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
    }


def models(path: str, created: int, context_length: int) -> dict[str, Any]:
    """`GET /v1/models`: the one model, with the longest input it takes."""
    entry = {
        "id": path,
        "object": "model",
        "created": created,
        "owned_by": "jaxdistill",
        "root": path,
        "parent": None,
        "max_model_len": context_length,
    }
    return {"object": "list", "data": [entry]}


def server_info(path: str, limits: Limits, max_queued_requests: int, weight_version: str) -> dict[str, Any]:
    """`GET /server_info`: the part of the genuine server's settings that this one has, by its names.

    An input of `max_req_input_len` tokens or more is refused.
    """
    return {
        "model_path": path,
        "tokenizer_path": path,
        "served_model_name": path,
        "weight_version": weight_version,
        "context_length": limits.context_length,
        "max_queued_requests": max_queued_requests,
        "max_req_input_len": limits.context_length,
        "status": "ready",
    }
