"""The decoder computes what transformers computes, from the very same files.

The folders of tests/golden/parity were written by scripts/make_parity_fixtures.py; docs/design/parity.md
says what they hold and why their numbers are unusual.

Letters: B rows, T positions, D hidden, V vocabulary.
"""

import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int32
from safetensors.numpy import load_file, save_file

from jaxdistill.errors import ConfigError
from jaxdistill.students import load_decoder, save_decoder, saving
from jaxdistill.students.attention import EMPTY_SLOT
from jaxdistill.students.decoder import Decoder
from jaxdistill.students.experts import load_balance

PARITY = Path(__file__).parents[2] / "golden" / "parity"
NAMES = [
    "llama",
    "llama_tied",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_yarn",
    "gemma2",
    "gemma3",
    "smollm3",
    "olmo2",
    "phi3",
]


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
    return decoder.logits(decoder(tokens))


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
    weights = decoder.weights()
    decode = nnx.jit(lambda decoder, *args: decoder.decode(*args))
    ids: list[int] = []
    for slot in range(len(prompt), capacity):
        ids.append(int(decoder.logits(hidden).argmax()))
        token, position = jnp.array(ids[-1:], jnp.int32), jnp.array([slot], jnp.int32)
        places = jnp.arange(capacity, dtype=jnp.int32)[None]
        places = jnp.where(places <= slot, places, EMPTY_SLOT)
        hidden, cache = decode(decoder, weights, token, position, jnp.int32(slot), places, cache)
    assert ids == continuation.tolist()


def test_gradients_are_those_of_transformers(
    decoder: Decoder, folder: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tokens = jnp.asarray(expected["tokens"])
    factors = jnp.asarray(expected["logit_weights"], jnp.float32)
    graphdef, params = nnx.split(decoder, nnx.Param)

    @jax.jit
    @jax.grad
    def gradient(params: nnx.State) -> Float[Array, ""]:
        return (logits_of(nnx.merge(graphdef, params), tokens) * factors).sum()

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


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    source = PARITY / "llama"
    decoder = load_decoder(source)
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((source / "model.safetensors").stat().st_size // 2, most))
    try:
        with pytest.raises(ConfigError, match=r"saved cannot be written \(.*too large.*make room"):
            save_decoder(decoder, tmp_path / "saved", source=source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert not (tmp_path / "saved").exists()


def test_a_saved_model_is_the_same_model(
    folder: Path, expected: dict[str, np.ndarray], decoder: Decoder, tmp_path: Path
) -> None:
    save_decoder(decoder, tmp_path / "saved", source=folder)
    tokens = jnp.asarray(expected["tokens"])
    again = logits_of(load_decoder(tmp_path / "saved"), tokens)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(logits_of(decoder, tokens)))


def test_an_export_in_bfloat16_is_the_model_rounded(tmp_path: Path) -> None:
    """Half the bytes, every weight the nearest there is, and the config says so."""
    source = PARITY / "phi3"
    save_decoder(load_decoder(source), tmp_path / "saved", source=source, dtype="bfloat16")
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == "bfloat16"
    original, again = (nnx.to_pure_dict(nnx.state(load_decoder(x))) for x in (source, tmp_path / "saved"))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), y),
        original, again,
    )  # fmt: skip
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "saved")]
    assert 0.4 < sizes[1] / sizes[0] < 0.6


@pytest.mark.parametrize("kept", ["k_proj", "layers.1.mlp.experts.3.", "embed_tokens", "layernorm"])
def test_tensors_of_several_dtypes_are_one_model(tmp_path: Path, kept: str) -> None:
    """Some in float32, the others in bfloat16: neither the one nor the other loses a bit on the way."""
    source = PARITY / "qwen3_moe"
    tensors = load_file(source / "model.safetensors")
    assert any(kept in name for name in tensors)
    rounded = {name: x if kept in name else x.astype(jnp.bfloat16) for name, x in tensors.items()}
    folders = [tmp_path / "several", tmp_path / "one"]
    for folder, cast in zip(folders, (lambda x: x, lambda x: x.astype(np.float32)), strict=True):
        folder.mkdir()
        shutil.copyfile(source / "config.json", folder / "config.json")
        save_file({name: cast(x) for name, x in rounded.items()}, folder / "model.safetensors")
    several, one = (nnx.to_pure_dict(nnx.state(load_decoder(folder))) for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, several, one)
    assert {leaf.dtype for leaf in jax.tree.leaves(several)} == {jnp.dtype(jnp.float32)}


def test_a_large_model_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PARITY / "gemma2"
    monkeypatch.setattr(saving, "SHARD_BYTES", 60_000)
    save_decoder(load_decoder(source), tmp_path / "saved", source=source)
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "saved" / file).stat().st_size < 70_000 for file in files)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    held = {name: load_file(tmp_path / "saved" / file)[name] for name, file in index["weight_map"].items()}
    original = load_file(source / "model.safetensors")
    assert held.keys() == original.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in original.values())
    for name, value in original.items():
        assert held[name].tobytes() == value.tobytes(), name
    again = load_decoder(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(x) for x in (again, load_decoder(source))))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
            r"shape \(7,\), config.json says",
        ),
        (lambda t: t.update({"model.layers.0.mlp.extra": np.ones(2, np.float32)}), "mlp.extra"),
        (lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}), "stored as I8"),
    ],
)
def test_a_folder_whose_tensors_are_not_the_config_s_is_refused(spoil, message, tmp_path: Path) -> None:
    source = PARITY / "qwen2"
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=message):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_decoder(tmp_path)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_folder(folder: Path, change: float | np.ndarray = 0.0) -> Path:
    """llama_tied with its matrix written twice, the second time with a change."""
    tensors = load_file(PARITY / "llama_tied" / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDING] + np.float32(change)
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(PARITY / "llama_tied" / "config.json", folder / "config.json")
    return folder


def test_a_tied_matrix_may_be_written_twice_or_as_the_head_alone(tmp_path: Path) -> None:
    wanted = nnx.state(load_decoder(PARITY / "llama_tied"))
    folder = tied_folder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_decoder(folder)), wanted)
    tensors = load_file(folder / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_decoder(folder)), wanted)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    """In its last row alone: every piece is looked at."""
    vocabulary, hidden = load_file(PARITY / "llama_tied" / "model.safetensors")[EMBEDDING].shape
    change = np.zeros((vocabulary, hidden), np.float32)
    change[-1, -1] = 1.0
    with pytest.raises(ConfigError, match=r'lm_head\.weight differs .* "tie_word_embeddings": false'):
        load_decoder(tied_folder(tmp_path, change))


def test_the_load_of_the_experts_is_that_of_transformers() -> None:
    with np.load(PARITY / "qwen3_moe" / "expected.npz") as stored:
        expected = dict(stored)
    decoder = load_decoder(PARITY / "qwen3_moe")
    real = np.arange(expected["tokens"].shape[1]) < expected["balance_lengths"][:, None]
    assert real.any() and not real.all()
    hidden, load = nnx.jit(Decoder.read)(decoder, jnp.asarray(expected["tokens"]), jnp.asarray(real))
    logits = np.asarray(decoder.logits(hidden))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    assert load is not None
    np.testing.assert_allclose(float(load_balance(load)), expected["balance"], rtol=1e-6)


def test_the_older_style_of_config_is_the_same_model(tmp_path: Path) -> None:
    source = PARITY / "llama"
    older = json.loads((source / "config.older.json").read_text())
    assert "rope_theta" in older and "rope_parameters" not in older and "head_dim" not in older
    shutil.copyfile(source / "config.older.json", tmp_path / "config.json")
    shutil.copyfile(source / "model.safetensors", tmp_path / "model.safetensors")
    with np.load(source / "expected.npz") as expected:
        got = logits_of(load_decoder(tmp_path), jnp.asarray(expected["tokens"]))
        np.testing.assert_allclose(np.asarray(got), expected["logits"], rtol=0, atol=1e-4)
