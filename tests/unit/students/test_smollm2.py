"""A genuine model: SmolLM2-135M-Instruct, against the logits transformers computed from the same folder.

Needs the folder that scripts/fetch_smollm2.py writes; skipped where it is not there.

Letters: B rows, T positions, D hidden, V vocabulary, N kept columns of V.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Float32, Int32

from jaxdistill.students import load_decoder
from jaxdistill.students.decoder import Decoder

GOLDEN = Path(__file__).parents[2] / "golden"

pytestmark = pytest.mark.genuine


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What transformers computed, and `real`: which positions [B, T] are not padding."""
    with np.load(GOLDEN / "smollm2" / "expected.npz") as stored:
        values = dict(stored)
    values["real"] = np.arange(values["tokens"].shape[1]) < values["lengths"][:, None]
    return values


@nnx.jit
def hidden_of(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Final hidden states [B, T, D]."""
    return decoder(tokens)


def logits_of(decoder: Decoder, tokens: Int32[np.ndarray, "B T"]) -> Float32[np.ndarray, "B T V"]:
    """Full logits; 16 MB for the rows of the golden file."""
    hidden = hidden_of(decoder, jnp.asarray(tokens))
    return np.asarray(jnp.einsum("btd,vd->btv", hidden, decoder.output_embedding))


@pytest.fixture(scope="module")
def decoder(smollm2: Path) -> Decoder:
    """The fetched model."""
    return load_decoder(smollm2)


@pytest.fixture(scope="module")
def logits(decoder: Decoder, expected: dict[str, np.ndarray]) -> Float32[np.ndarray, "B T V"]:
    """Logits of both rows in one right-padded batch."""
    return logits_of(decoder, expected["tokens"])


def test_logits_are_those_of_transformers(logits: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    difference = np.abs(logits[..., expected["columns"]] - expected["logits"])[expected["real"]]
    assert difference.max() <= 1e-3


def test_the_best_ids_are_those_of_transformers(logits: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    real = expected["real"]
    at_ids = np.take_along_axis(logits, expected["top_ids"], axis=-1)
    assert np.abs(at_ids - expected["top_logits"])[real].max() <= 1e-3
    assert (logits.argmax(-1) == expected["top_ids"][..., 0])[real].all()


def test_logprobs_are_those_of_transformers(logits: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    logsumexp = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    assert np.abs(logsumexp - expected["logsumexp"])[expected["real"]].max() <= 1e-3
    chosen = np.take_along_axis(logits[:, :-1], expected["tokens"][:, 1:, None], axis=-1)[..., 0]
    difference = np.abs(chosen - logsumexp[:, :-1] - expected["next_logprob"][:, :-1])
    assert difference[expected["real"][:, 1:]].max() <= 1e-3


@pytest.mark.parametrize("version", ["0.5.15", "0.5.23"])
def test_logprobs_are_those_a_genuine_sglang_server_sent(
    decoder: Decoder, expected: dict[str, np.ndarray], version: str
) -> None:
    record = json.loads((GOLDEN / "sglang" / version / "score_single_mnt0.json").read_text())
    ids = record["request"]["input_ids"]
    recorded = [entry[0] for entry in record["response"]["meta_info"]["input_token_logprobs"]]
    assert recorded[0] is None and len(recorded) == len(ids)
    # The server that was recorded had loaded a bfloat16 copy of the weights, and computed in float32.
    graphdef, params = nnx.split(decoder, nnx.Param)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    row = np.zeros((1, expected["tokens"].shape[1]), np.int32)
    row[0, : len(ids)] = ids
    logprobs = np.asarray(jax.nn.log_softmax(logits_of(nnx.merge(graphdef, rounded), row)[0], axis=-1))
    got = logprobs[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(got, recorded[1:], rtol=0, atol=1e-4)
