"""What the teacher's client itself costs: writing requests, decoding replies, checking them.

`python benchmarks/teacher_client.py [--smoke] [--out FILE]`

64 rows of 2,048 response tokens, two rows (4,096 response tokens) a request, without and with the most likely
tokens at each position, in both forms that servers write them in. Prints one JSON line a measurement: CPU
milliseconds for one request and its reply, the parts of that, the reply's size, and where there is one the
limit and whether it holds. Exit code 1 if it does not. --out also writes them with a description of the
machine.
"""

import base64
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from measure import Report, cpu_seconds, figure, options

from jaxdistill.records import Unscored
from jaxdistill.teachers.checks import (
    Asked,
    ScoringRow,
    check_row,
    group_rows,
    largest_reply,
    scoring_request,
)
from jaxdistill.teachers.replies import read_reply

ROWS, LENGTH, GROUP = 64, 2_048, 4_096  # rows, response tokens of each, response tokens of a request
PROMPT = 64
VOCABULARY = 151_936
MOST_MS = 50.0  # with the 64 most likely tokens in flat form
CASES = [(0, "list"), (16, "list"), (16, "flat"), (64, "list"), (64, "flat")]
ROUNDS = 3


def batch(rows: int) -> list[ScoringRow]:
    """Rows of random ids."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (rows, PROMPT + LENGTH), dtype=np.int32)
    return [ScoringRow(number, row[:PROMPT], row[PROMPT:]) for number, row in enumerate(ids)]


def tables(row: ScoringRow, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities of the row's own tokens, and ids [S, k] and values [S, k] of the most likely ones.

    Every other token is among them, at any rank; the rest lie below them all.
    """
    random = np.random.default_rng(row.number)
    size = len(row.response)
    logits = -np.sort(-random.normal(0, 3, (size, k + 1)), axis=1)
    values = np.float32(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[:, :k]
    # Steps that together stay below the vocabulary: no id comes twice, nor the one they start from.
    ids = np.cumsum(random.integers(1, VOCABULARY // (k + 1), (size, k)), axis=1)
    own = np.float32(values[:, -1:].min(axis=1, initial=-1.0) - 1.0)
    listed = np.arange(0, size, 2) if k else np.arange(0)
    rank = random.integers(0, max(k, 1), len(listed))
    if k:
        own[listed] = values[listed, rank]
        ids[listed] -= ids[listed, rank][:, None]
    return own, np.int32((ids + row.response[:, None]) % VOCABULARY), values


def reply(rows: Sequence[ScoringRow], k: int, form: str) -> bytes:
    """A sound reply, as a server writes it."""
    return orjson.dumps(
        [{"text": "", "output_ids": [], "meta_info": meta_info(row, k, form)} for row in rows]
    )


def meta_info(row: ScoringRow, k: int, form: str) -> dict[str, Any]:
    own, ids, values = tables(row, k)
    scored = zip(own.astype(float).tolist(), row.response.tolist(), strict=True)
    meta: dict[str, Any] = {
        "prompt_tokens": len(row),
        "weight_version": "default",
        "input_token_logprobs": [[None, int(row.prompt[-1]), None], *([v, i, None] for v, i in scored)],
    }
    if k and form == "list":
        pairs = zip(values.tolist(), ids.tolist(), strict=True)
        lists = [[[v, i, None] for v, i in zip(*pair, strict=True)] for pair in pairs]
        meta["input_top_logprobs"] = [None, *lists]
    elif k:
        meta["input_top_logprobs_shape"] = list(ids.shape)
        meta["input_top_logprobs_null_prefix"] = 1
        for part, array in (("val", values.astype("<f4")), ("idx", ids.astype("<i4"))):
            meta[f"input_top_logprobs_{part}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
            meta[f"input_top_logprobs_{part}_flat_b64_dtype"] = array.dtype.name
    return meta


def measure(groups: Sequence[Sequence[ScoringRow]], k: int, form: str) -> dict[str, Any]:
    """CPU time of one request and its reply, as a mean over the groups of a batch."""
    asked = Asked(k)
    parts = {"write": 0.0, "decode": 0.0, "check": 0.0}
    size = 0
    for group in groups:
        content = reply(group, k, form)
        body = orjson.loads(content)
        found = read_reply(body, group, asked, VOCABULARY)
        assert not any(isinstance(one, Unscored) for one in found), found[0]
        assert len(content) <= largest_reply(group, asked)
        size += len(content)

        def write(group: Sequence[ScoringRow] = group) -> None:
            for row in group:
                check_row(row, VOCABULARY)
            orjson.dumps(scoring_request(group, asked))

        def decode(content: bytes = content) -> None:
            orjson.loads(content)

        def check(body: Any = body, group: Sequence[ScoringRow] = group) -> None:
            read_reply(body, group, asked, VOCABULARY)

        for name, work in (("write", write), ("decode", decode), ("check", check)):
            parts[name] += cpu_seconds(work, repeats=1, rounds=ROUNDS)
    milliseconds = {name: 1000 * value / len(groups) for name, value in parts.items()}
    total = sum(milliseconds.values())
    headline = (k, form) == (64, "flat")
    unit = f"CPU ms a request of {GROUP} response tokens"
    row = figure(f"client_top{k}_{form}_ms", total, unit, MOST_MS if headline else None)
    if headline:
        row["ratio"] = round(total / MOST_MS, 3)
    return {
        **row,
        "parts": {name: round(value, 2) for name, value in milliseconds.items()},
        "reply_bytes": size // len(groups),
        "batch_seconds": round(total * len(groups) / 1000, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = options(__doc__).parse_args(argv)
    per_group = GROUP // LENGTH
    groups = group_rows(batch(per_group if arguments.smoke else ROWS), GROUP + per_group * PROMPT)
    assert {len(group) for group in groups} == {per_group}
    report = Report("teacher_client", arguments)
    for k, form in CASES:
        report.add(measure(groups, k, form))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
