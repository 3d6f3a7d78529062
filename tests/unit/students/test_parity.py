"""The decoder computes what transformers computes, from the very same files.

The folders of tests/golden/parity were written by scripts/make_parity_fixtures.py; docs/design/parity.md
says what they hold and why their numbers are unusual.

Letters: B rows, T positions, D hidden, V vocabulary.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int32
from safetensors.numpy import load_file

from jaxdistill.students.decoder import Decoder
from jaxdistill.students.weights import load_decoder, save_decoder

PARITY = Path(__file__).parents[2] / "golden" / "parity"
NAMES = ["llama", "llama_tied", "qwen3"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    """One model folder after the other."""
    return PARITY / request.param


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    """What transformers computed from it."""
    with np.load(folder / "expected.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    """Our decoder over the same weights."""
    return load_decoder(folder)


@nnx.jit
def logits_of(decoder: Decoder, tokens: Int32[Array, "B T"]) -> Float[Array, "B T V"]:
    """Full logits; the package never builds them, a tiny vocabulary may."""
    return jnp.einsum("btd,vd->btv", decoder(tokens), decoder.output_embedding)


def test_logits_are_those_of_transformers(decoder: Decoder, expected: dict[str, np.ndarray]) -> None:
    got = np.asarray(logits_of(decoder, jnp.asarray(expected["tokens"])))
    assert np.std(expected["logits"]) > 1  # a difference of 1e-4 is small against these
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-4)


def test_greedy_continuation_is_that_of_transformers(
    decoder: Decoder, expected: dict[str, np.ndarray]
) -> None:
    prompt, continuation = expected["prompt"], expected["greedy"]
    row = np.zeros((1, len(prompt) + len(continuation)), np.int32)  # right padding: one shape, one program
    row[0, : len(prompt)] = prompt
    for position in range(len(prompt), row.shape[1]):
        row[0, position] = int(logits_of(decoder, jnp.asarray(row))[0, position - 1].argmax())
    assert row[0, len(prompt) :].tolist() == continuation.tolist()


def test_greedy_continuation_through_the_cache_is_that_of_transformers(
    decoder: Decoder, expected: dict[str, np.ndarray]
) -> None:
    prompt, continuation = expected["prompt"], expected["greedy"]
    capacity = len(prompt) + len(continuation)
    lengths = jnp.array([len(prompt)], jnp.int32)
    hidden, cache = decoder.prefill(jnp.asarray(prompt)[None], lengths, capacity)
    decode = nnx.jit(lambda decoder, *args: decoder.decode(*args))
    ids: list[int] = []
    for slot in range(len(prompt), capacity):
        ids.append(int((hidden @ decoder.output_embedding.T).argmax()))
        token, position = jnp.array(ids[-1:], jnp.int32), jnp.array([slot], jnp.int32)
        visible = jnp.arange(capacity)[None] <= slot
        hidden, cache = decode(decoder, token, position, jnp.int32(slot), visible, cache)
    assert ids == continuation.tolist()


def test_gradients_are_those_of_transformers(
    decoder: Decoder, folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tokens = jnp.asarray(expected["tokens"])
    weights = jnp.asarray(expected["logit_weights"], jnp.float32)
    graphdef, params = nnx.split(decoder, nnx.Param)

    @jax.jit
    @jax.grad
    def gradient(params: nnx.State) -> Float[Array, ""]:
        return (logits_of(nnx.merge(graphdef, params), tokens) * weights).sum()

    # A gradient has the layout of its parameter, so the exporter itself gives it the checkpoint's names.
    save_decoder(nnx.merge(graphdef, gradient(params)), tmp_path / "gradient", source=folder)
    got = load_file(tmp_path / "gradient" / "model.safetensors")

    norms = {key.removeprefix("gradient_norm/"): expected[key] for key in expected if "_norm/" in key}
    assert norms.keys() == got.keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(got[name]), norm, rtol=1e-3, err_msg=name)
    arrays = {key.removeprefix("gradient/"): expected[key] for key in expected if key.startswith("gradient/")}
    assert len(arrays) >= 8
    for name, want in arrays.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[name] / scale, want / scale, rtol=0, atol=1e-3, err_msg=name)


def test_saving_gives_back_every_tensor_bit_for_bit(decoder: Decoder, folder: Path, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path / "saved", source=folder)
    original = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, value in original.items():
        assert saved[name].dtype == value.dtype
        assert saved[name].shape == value.shape, name
        assert saved[name].tobytes() == value.tobytes(), name


def test_a_saved_model_is_the_same_model(
    folder: Path, expected: dict[str, np.ndarray], decoder: Decoder, tmp_path: Path
) -> None:
    save_decoder(decoder, tmp_path / "saved", source=folder)
    tokens = jnp.asarray(expected["tokens"])
    again = logits_of(load_decoder(tmp_path / "saved"), tokens)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(logits_of(decoder, tokens)))


def test_the_older_style_of_config_is_the_same_model(tmp_path: Path) -> None:
    source = PARITY / "llama"
    older = json.loads((source / "config.older.json").read_text())
    assert "rope_theta" in older and "rope_parameters" not in older and "head_dim" not in older
    shutil.copyfile(source / "config.older.json", tmp_path / "config.json")
    shutil.copyfile(source / "model.safetensors", tmp_path / "model.safetensors")
    with np.load(source / "expected.npz") as expected:
        got = logits_of(load_decoder(tmp_path), jnp.asarray(expected["tokens"]))
        np.testing.assert_allclose(np.asarray(got), expected["logits"], rtol=0, atol=1e-4)
