"""`scripts/convert_gguf.py`, on files that the gguf library writes of small models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
TOY = ROOT / "assets/toy/student"


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection as llama-type GGUF files have them: both halves of a head by
    turns."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, *, architecture: str = "llama", quantised: bool = False, **fields: Any) -> None:
    """The toy student as a GGUF file."""
    config = json.loads((TOY / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]))
    writer.add_rope_dimension_count(
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("toy")
    writer.add_token_list([f"<{index}>" for index in range(config["vocab_size"])])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    for name, weight in load_file(TOY / "model.safetensors").items():
        module = name.removesuffix(".weight")
        layer = ""
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        if NAMES[module] in ("attn_q", "attn_k"):
            weight = pairs(
                weight, config["num_attention_heads" if NAMES[module] == "attn_q" else "num_key_value_heads"]
            )
        weight = np.ascontiguousarray(weight, np.float32)
        if quantised and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{layer}{NAMES[module]}.weight", quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{layer}{NAMES[module]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/convert_gguf.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_the_model_comes_back_bit_for_bit_and_loads(tmp_path: Path) -> None:
    from jaxdistill.students import load_decoder
    from jaxdistill.text import Tokenizer

    write_gguf(tmp_path / "toy.gguf")
    out = tmp_path / "out"
    done = convert(tmp_path / "toy.gguf", "--out", out, "--tokenizer", TOY)
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(out / "model.safetensors"), load_file(TOY / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.astype(np.float32), err_msg=name)
    assert load_decoder(out).config == load_decoder(TOY).config
    assert Tokenizer.load(str(out)).vocab_fingerprint == Tokenizer.load(str(TOY)).vocab_fingerprint


@pytest.mark.slow
def test_quantised_weights_are_what_they_stand_for(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", quantised=True)
    done = convert(tmp_path / "toy.gguf", "--out", tmp_path / "out", "--tokenizer", TOY)
    assert done.returncode == 0, done.stderr
    name, q8 = "model.embed_tokens.weight", GGMLQuantizationType.Q8_0
    source = load_file(TOY / "model.safetensors")[name].astype(np.float32)
    found = load_file(tmp_path / "out/model.safetensors")[name]
    np.testing.assert_array_equal(found, dequantize(quantize(source, q8), q8))
    assert np.any(found != source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (None, (), "no GGUF file at"),
        ("text", (), "cannot be read as GGUF"),
        ({"architecture": "rwkv6"}, (), "its architecture is 'rwkv6', expected 'llama' or 'gemma3'"),
        ({"llama__rope__scaling__type": "yarn"}, (), "its rotary positions are scaled ('yarn')"),
        ({}, (), "no pre-tokenizer known for it"),
        ({}, ("--tokenizer", "assets/toy/teacher"), "they are of two models"),
        ({}, ("--out", "assets"), "exists already; choose a new folder"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    tmp_path: Path, made: dict[str, str] | str | None, options: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "model.gguf"
    if isinstance(made, str):
        file.write_text("no model")
    elif made is not None:
        write_gguf(file, **made)
    done = convert(file, "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
