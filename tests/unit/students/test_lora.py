"""Adapters against what they are by definition (the merged weights), and against PEFT.

tests/golden/lora was written by scripts/make_lora_fixtures.py with PEFT itself.

Letters: L layers.
"""

import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError
from safetensors.numpy import load_file

from jaxdistill.errors import ConfigError
from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings
from jaxdistill.samplers import Generator, sampling_params
from jaxdistill.students import LoraConfig, abstract_decoder, load_decoder, merge, read_config, save_adapters
from jaxdistill.students.decoder import Decoder
from jaxdistill.students.lora import Target, adapter_shapes, trained_and_frozen

GOLDEN = Path(__file__).parents[2] / "golden"
PARITY = GOLDEN / "parity"
# Biases on every product; norms behind and scaled tied embeddings; kernels that are parts of one tensor.
FAMILIES = ["llama3", "gemma2", "phi3"]
LORA = LoraConfig(rank=3, alpha=5.0)


@nnx.jit
def logits_of(decoder, tokens):
    return decoder.logits(decoder(tokens))


def tokens_of(folder: Path) -> jax.Array:
    with np.load(folder / "expected.npz") as stored:
        return jnp.asarray(stored["tokens"])


def with_numbers(folder: Path, lora: LoraConfig = LORA) -> Decoder:
    """A decoder whose adapters change it: B is not zero."""
    graphdef, variables = nnx.split(load_decoder(folder, lora=lora, seed=1), nnx.Param)
    params = nnx.to_pure_dict(variables)
    rng = np.random.default_rng(0)
    params["adapters"] = {
        name: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.2 * x.shape[1] ** -0.5)
        for name, x in params["adapters"].items()
    }
    return nnx.merge(graphdef, params)


def merged(decoder: Decoder, folder: Path, lora: LoraConfig = LORA) -> Decoder:
    graphdef = nnx.split(abstract_decoder(read_config(folder)), nnx.Param)[0]
    return nnx.merge(graphdef, merge(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)), lora))


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_adapters_are_the_identity_and_others_are_the_merged_weights(name):
    folder = PARITY / name
    tokens, fresh = tokens_of(folder), load_decoder(folder, lora=LORA)
    base = logits_of(load_decoder(folder), tokens)
    np.testing.assert_array_equal(logits_of(fresh, tokens), base)
    decoder = with_numbers(folder)
    apart, whole = logits_of(decoder, tokens), logits_of(merged(decoder, folder), tokens)
    assert np.abs(apart - base).max() > 0.1
    scale = np.abs(apart).max()
    np.testing.assert_allclose(apart / scale, whole / scale, rtol=0, atol=1e-5)


def test_fresh_adapters_are_drawn_as_peft_draws_them():
    adapters = nnx.to_pure_dict(nnx.state(load_decoder(PARITY / "qwen3", lora=LORA).adapters, nnx.Param))
    assert {key.split("_lora_")[0] for key in adapters} == set(get_args(Target))
    for key, x in adapters.items():
        bound = x.shape[1] ** -0.5 if key.endswith("_a") else 0.0  # uniform within +-in^-1/2
        assert np.abs(x).max() <= bound and np.std(x) == pytest.approx(bound * 3**-0.5, rel=0.1)


def test_fresh_adapters_hang_on_the_seed_alone():
    def draw(**settings):
        decoder = load_decoder(PARITY / "qwen3", lora=LORA, **settings)
        return nnx.to_pure_dict(nnx.state(decoder.adapters, nnx.Param))

    one, mesh = draw(seed=3), make_mesh(MeshConfig())
    jax.tree.map(np.testing.assert_array_equal, one, draw(seed=3, mesh=mesh))
    assert (one["query_lora_a"] != draw(seed=4)["query_lora_a"]).any()


def test_gradients_of_a_and_b_are_the_chain_rule_of_the_merged_weights():
    """y = x (W + s A B): dA = s dW B', dB = s A' dW."""
    folder = PARITY / "qwen3"
    decoder, tokens = with_numbers(folder), tokens_of(folder)

    def gradient(of: Decoder):
        graphdef, variables = nnx.split(of, nnx.Param)
        value = lambda params: jnp.square(logits_of(nnx.merge(graphdef, params), tokens)).sum()  # noqa: E731
        return jax.grad(value)(nnx.to_pure_dict(variables))

    adapters = nnx.to_pure_dict(nnx.state(decoder.adapters, nnx.Param))
    ours, full = gradient(decoder)["adapters"], gradient(merged(decoder, folder))["layers"]
    for target in LORA.targets:
        a, b = (np.asarray(adapters[f"{target}_lora_{x}"], np.float64) for x in "ab")
        d = np.asarray(full[target], np.float64)
        expected = {
            f"{target}_lora_a": LORA.scale * np.einsum("lio,lro->lir", d, b),
            f"{target}_lora_b": LORA.scale * np.einsum("lir,lio->lro", a, d),
        }
        for key, want in expected.items():
            largest = np.abs(want).max()
            np.testing.assert_allclose(ours[key] / largest, want / largest, rtol=0, atol=1e-4, err_msg=key)


def test_samples_have_the_log_probabilities_of_the_training_forward():
    folder = PARITY / "gemma2"
    decoder = with_numbers(folder)
    graphdef, params = nnx.split(decoder)
    prompts, new = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32), 9
    lengths = np.array([4, 2], np.int32)
    out = Generator(graphdef, segment=4)(
        params, prompts, lengths, np.full(2, new, np.int32), jax.random.split(jax.random.key(0), 4),
        sampling_params(1.0), samples=2, max_new_tokens=new, stop_ids=(),
    )  # fmt: skip
    for row in range(4):
        ids = [*prompts[row // 2, : lengths[row // 2]], *out.tokens[row]]
        logprobs = jax.nn.log_softmax(logits_of(decoder, jnp.asarray([ids], jnp.int32))[0], axis=-1)
        first = lengths[row // 2] - 1
        want = [logprobs[first + i, token] for i, token in enumerate(out.tokens[row])]
        np.testing.assert_allclose(out.logprobs[row], want, rtol=0, atol=1e-4)


def test_frozen_matrices_are_kept_in_the_compute_dtype_and_give_the_same_bits():
    """They are read in no other; a float32 copy would only take room."""
    folder = PARITY / "qwen3"
    decoder = load_decoder(folder, lora=LORA, compute_dtype=jnp.bfloat16)
    trained, frozen = trained_and_frozen(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    flat = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(frozen)}
    assert {name for name, dtype in flat.items() if dtype == jnp.float32} == {
        name for name in flat if "_norm" in name
    }
    plain = load_decoder(folder, compute_dtype=jnp.bfloat16)
    tokens = tokens_of(folder)
    np.testing.assert_array_equal(logits_of(decoder, tokens), logits_of(plain, tokens))


def test_what_is_trained_and_what_is_frozen_are_the_parameters():
    params = {"embedding": 1, "layers": {"query": 2}}
    assert trained_and_frozen(params) == (params, {})
    assert trained_and_frozen(params | {"adapters": {"a": 3}}) == ({"adapters": {"a": 3}}, params)


def peft_adapters() -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """What PEFT wrote, as our parameters; the names are spelled out here once more."""
    facts = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
    tensors = load_file(GOLDEN / "lora" / "adapter_model.safetensors")
    modules = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    found = {
        f"{target}_lora_{letter.lower()}": np.stack(
            [
                tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight"].T
                for layer in range(2)
            ]
        )
        for target, module in modules.items()
        for letter in "AB"
    }
    return LoraConfig(rank=facts["r"], alpha=facts["lora_alpha"]), found


def test_logits_are_those_of_peft():
    lora, adapters = peft_adapters()
    graphdef, variables = nnx.split(load_decoder(PARITY / "llama", lora=lora), nnx.Param)
    params = nnx.to_pure_dict(variables) | {"adapters": jax.tree.map(jnp.asarray, adapters)}
    with np.load(GOLDEN / "lora" / "expected.npz") as expected:
        got = logits_of(nnx.merge(graphdef, params), jnp.asarray(expected["tokens"]))
        base = logits_of(load_decoder(PARITY / "llama"), jnp.asarray(expected["tokens"]))
        assert np.abs(expected["logits"] - base).max() > 1
        np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-4)


def test_adapters_are_written_as_peft_writes_them(tmp_path):
    lora, adapters = peft_adapters()
    config = read_config(PARITY / "llama")
    save_adapters(adapters, tmp_path / "out", config=config, lora=lora, base="tests/golden/parity/llama")
    ours, theirs = (load_file(x / "adapter_model.safetensors") for x in (tmp_path / "out", GOLDEN / "lora"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    facts, peft = (
        json.loads((x / "adapter_config.json").read_text()) for x in (tmp_path / "out", GOLDEN / "lora")
    )
    facts["target_modules"], peft["target_modules"] = (
        set(facts["target_modules"]),
        set(peft["target_modules"]),
    )
    assert facts == {key: peft[key] for key in facts}
    # What is not written is what PEFT takes it to be.
    assert not [key for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if peft[key]]


def test_parts_of_a_fused_matrix_cannot_be_written_for_peft(tmp_path):
    config = read_config(PARITY / "phi3")
    adapters = {
        name: np.zeros((config.num_layers, *shape), np.float32)
        for name, (shape, _) in adapter_shapes(config, LORA).items()
    }
    with pytest.raises(ConfigError, match=r"query, key, value, gate, up as parts .* without --adapters"):
        save_adapters(adapters, tmp_path / "out", config=config, lora=LORA, base="phi3")
    assert not (tmp_path / "out").exists()
    whole = LoraConfig(rank=3, targets=("output", "down"))
    save_adapters(adapters, tmp_path / "out", config=config, lora=whole, base="phi3")
    assert len(load_file(tmp_path / "out/adapter_model.safetensors")) == 2 * 2 * config.num_layers


def test_targets_the_student_has_not_are_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"no gate, up, down .*give some of \['query', 'key', 'value', 'output'\]"
    ):
        load_decoder(PARITY / "qwen3_moe", lora=LORA)
    attention = LoraConfig(rank=3, targets=("query", "output"))
    decoder = load_decoder(PARITY / "qwen3_moe", lora=attention)
    assert len(jax.tree.leaves(nnx.state(decoder.adapters, nnx.Param))) == 4
    for bad in (
        {"rank": 0},
        {"alpha": 0.0},
        {"targets": ()},
        {"targets": ("query", "query")},
        {"targets": ("q",)},
    ):
        with pytest.raises(ValidationError):
            LoraConfig.model_validate(bad)


def test_adapters_lie_as_their_kernels_and_no_mesh_axis_stands_twice():
    shapes = adapter_shapes(read_config(PARITY / "llama"), LORA)
    assert shapes["query_lora_a"][1] == ("embed", None) and shapes["query_lora_b"][1] == ("rank", "heads")
    assert shapes["down_lora_a"][1] == ("mlp", "rank") and shapes["down_lora_b"][1] == (None, "embed")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    blank = abstract_decoder(read_config(PARITY / "llama"), lora=LORA)
    places = param_shardings(nnx.state(blank, nnx.Param), mesh)["adapters"]
    assert all(len(place.spec) == 3 for place in places.values())
