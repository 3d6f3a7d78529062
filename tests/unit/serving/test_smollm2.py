"""A genuine model behind the genuine application: SmolLM2-135M-Instruct in float32, against what
transformers computed and what two SGLang releases answered (float32, on a CPU).

Letters: B rows, T positions.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiohttp import web
from flax import nnx

from jaxdistill.serving.app import Served, make_app
from jaxdistill.serving.engine import DecoderEngine
from jaxdistill.serving.model import load_engine
from jaxdistill.students import load_decoder
from jaxdistill.text import Tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
ATOL = 1e-3

pytestmark = pytest.mark.genuine


Post = Callable[[Any], Any]


@contextmanager
def posting(app: web.Application, serving: Callable[..., Any]) -> Iterator[Post]:
    """Posts one body to the application's /generate."""
    with serving(app) as url:

        def post(body: Any) -> Any:
            with urlopen(Request(f"{url}/generate", data=json.dumps(body).encode()), timeout=300) as reply:
                return json.loads(reply.read())

        yield post


@pytest.fixture(scope="module")
def generate(smollm2: Path, serving: Callable[..., Any]) -> Iterator[Post]:
    """The model as it is stored."""
    parts = load_engine(smollm2, max_batch_tokens=512, context_length=None)
    with posting(make_app(*parts), serving) as post:
        yield post


@pytest.fixture(scope="module")
def generate_rounded(smollm2: Path, serving: Callable[..., Any]) -> Iterator[Post]:
    """The model with its weights rounded to bfloat16, which is how the recorded servers had them stored
    (they computed in float32); unrounded weights are up to 0.06 away from their numbers."""
    graphdef, params = nnx.split(load_decoder(smollm2))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    tokenizer = Tokenizer.load(str(smollm2))
    engine = DecoderEngine(nnx.merge(graphdef, rounded), tokenizer.stop_ids, max_batch_tokens=512)
    served = Served(path=str(smollm2), config={}, text=lambda ids: tokenizer.spans(ids).text)
    with posting(make_app(engine, served), serving) as post:
        yield post


def test_served_logprobs_are_those_of_transformers(generate: Post) -> None:
    with np.load(GOLDEN / "smollm2" / "expected.npz") as stored:
        expected = dict(stored)
    rows = [ids[:n].tolist() for ids, n in zip(expected["tokens"], expected["lengths"], strict=True)]
    replies = generate(
        {
            "input_ids": rows,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
    )
    for row, reply, by_transformers in zip(rows, replies, expected["next_logprob"], strict=True):
        entries = reply["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in entries] == row
        got = np.array([entry[0] for entry in entries[1:]])
        np.testing.assert_allclose(got, by_transformers[: len(row) - 1], rtol=0, atol=ATOL)


RECORDED = ["score_single_mnt0", "score_batch_mnt0", "score_batch_mnt1_perreq", "one_token"]


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
@pytest.mark.parametrize("name", RECORDED)
def test_served_logprobs_are_those_of_sglang(generate_rounded: Post, version: str, name: str) -> None:
    recorded = json.loads((GOLDEN / "sglang" / version / f"{name}.json").read_text())
    got, wanted = generate_rounded(recorded["request"]), recorded["response"]
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, list) else [(got, wanted)]
    for ours, theirs in pairs:
        assert (ours["output_ids"], ours["text"]) == (theirs["output_ids"], theirs["text"])
        for field, values in theirs["meta_info"].items():
            if field.endswith("_logprobs"):
                compare(ours["meta_info"][field], values)


def compare(ours: Any, theirs: Any) -> None:
    """Same nesting, ids and nulls; log-probabilities within the tolerance."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            compare(one, other)
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= 1e-4
    else:
        assert ours == theirs
