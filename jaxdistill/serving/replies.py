"""Engine results -> JSON replies with the keys, nesting and order of the genuine server's.

Letters: N prompt tokens, M new tokens, Q reported positions, K top-k, C chosen ids.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdistill.serving.protocol import Row, RowResult, Statistics

Triple = list[Any]  # [logprob, token id, text]; the text is never filled in here
Distribution = list[Triple] | None  # None where a position has nothing before it


def generate_reply(
    row: Row, result: RowResult, *, text: Callable[[np.ndarray], str], seconds: float, weight_version: str
) -> dict[str, Any]:
    """The reply for one row: text, ids and `meta_info`. `seconds` is the time since its arrival."""
    output = result.output_ids
    count = len(output)
    if result.stopped:
        finish: dict[str, Any] = {"type": "stop", "matched": int(output[-1])}
    else:
        finish = {"type": "length", "length": count}
    meta = {
        "id": row.rid,
        "finish_reason": finish,
        "prompt_tokens": len(row.ids),
        "weight_version": weight_version,
        "num_retractions": 0,
        **({} if result.statistics is None else _logprob_fields(row, output, result.statistics)),
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


def _logprob_fields(row: Row, output: np.ndarray, statistics: Statistics) -> dict[str, Any]:
    """The log-probability lists; those that were not asked for are left out, key and all.

    A list over prompt positions begins with the entry of `row.start`, whose value is always null:
    the genuine server does not report the distribution that token came from.
    """
    inputs = len(row.ids) - row.first  # positions of the prompt among the reported ones
    values = statistics.logprob.tolist()
    ids = row.ids[row.start :].tolist()
    scored: list[Triple] = [[None, ids[0], None]] if ids else []
    scored += [[value, token, None] for value, token in zip(values[:inputs], ids[1:], strict=True)]
    drawn = zip(values[inputs : inputs + len(output)], output.tolist(), strict=True)
    fields: dict[str, Any] = {
        "input_token_logprobs": scored,
        "output_token_logprobs": [[value, token, None] for value, token in drawn],
        "output_token_logprobs_length": len(output),
    }
    head: list[Distribution] = [None] if ids else []
    if row.top_k:
        top = _triples(statistics.topk_logprobs, statistics.topk_ids)
        fields["input_top_logprobs"] = head + top[:inputs]
        fields["output_top_logprobs"] = top[inputs:]
    if row.chosen:
        asked = np.broadcast_to(np.asarray(row.chosen, np.int32), statistics.chosen_logprobs.shape)
        chosen = _triples(statistics.chosen_logprobs, asked)
        fields["input_token_ids_logprobs"] = head + chosen[:inputs]
        fields["output_token_ids_logprobs"] = chosen[inputs:]
    return fields


def _triples(logprobs: np.ndarray, ids: np.ndarray) -> list[Distribution]:
    return [
        [[value, token, None] for value, token in zip(values, tokens, strict=True)]
        for values, tokens in zip(logprobs.tolist(), ids.tolist(), strict=True)
    ]


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
