"""Make the fixtures that hold the decoder to transformers: needs an environment with torch.

    python scripts/make_parity_fixtures.py [NAME ...]               # tests/golden/parity/<name>/
    python scripts/make_parity_fixtures.py --smollm2 DIR [--recorded REPLY.json ...]   # tests/golden/smollm2/

The first form writes tiny random models (all, or those named) in Hugging Face format, each with what
transformers computes from it: logits, a greedy continuation, gradients. The second writes the logits of
the SmolLM2 folder that `scripts/fetch_smollm2.py` made, and compares recorded SGLang replies with the
same weights.
Everything is seeded; docs/design/parity.md says what the files show.

Shape letters: B = rows, T = positions, V = vocabulary, N = columns kept of V, K = 16 best ids,
E = experts.
"""

# pyright: reportMissingImports=false
# (torch is not in the environment of the package)

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
VOCAB, ROWS, LENGTH, PROMPT, CONTINUATION = 128, 2, 17, 5, 8
# Choices of the greedy continuation must not hang on rounding: the best logit leads by at least this.
GREEDY_MARGIN = 0.05
# Nor may the choice of experts: the least likely chosen one leads by this much, in the router's logits.
ROUTER_MARGIN = 0.005
DISTINCT = 5  # a continuation that repeats one token would test little
GRADIENTS = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.k_norm.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.self_attn.v_proj.bias",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.2.mlp.gate.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight",
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.2.mlp.experts.5.down_proj.weight",
    "model.layers.0.pre_feedforward_layernorm.weight",
    "model.layers.1.post_feedforward_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)

# A chat in the recorded SGLang requests, ids of SmolLM2's own vocabulary.
RECORDED_IDS = (1, 520, 9531, 198, 28120, 2, 198, 1, 4093, 198, 504, 3575, 282, 4649, 314, 7042, 30, 2)
MULTILINGUAL = "Ça coûte 3 €, grüß мир! 日本 你好 😀 ≈\ndef f(x):\n    return x ** 20  # end of the text"
MULTILINGUAL_LENGTH, COLUMN_STEP, TOP = 40, 64, 16


@dataclass(frozen=True)
class Recipe:
    """One tiny model: its config, the size of its random embedding, and the mean of its norms' weights."""

    config: PreTrainedConfig
    embedding_scale: float
    seed: int
    norm: float = 1.0


# Bases and epsilons are unusual on purpose: a reader that falls back on a default fails the comparison.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def recipes() -> dict[str, Recipe]:
    """The models, by folder name. Windows are shorter than the rows, and layers are as many as it takes for
    their kinds to repeat and leave a rest."""

    def rope(theta: float, **scaling: Any) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": theta, **scaling}

    wide = {**COMMON, "hidden_size": 48, "intermediate_size": 80}
    grouped = {**wide, "num_attention_heads": 6, "num_key_value_heads": 2}
    heads16 = {**wide, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    llama_tied = {
        **COMMON,
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    return {
        "llama": Recipe(
            LlamaConfig(**grouped, rms_norm_eps=1e-5, rope_parameters=rope(5e4), tie_word_embeddings=False),
            1.0, seed=11,
        ),
        "llama_tied": Recipe(
            LlamaConfig(
                **llama_tied, num_key_value_heads=4, rms_norm_eps=3e-3, rope_parameters=rope(300.0),
                tie_word_embeddings=True,
            ),
            0.5, seed=22,
        ),
        "qwen3": Recipe(
            Qwen3Config(**heads16, rms_norm_eps=1e-6, rope_parameters=rope(1e6), tie_word_embeddings=True),
            0.5, seed=33,
        ),
        # A context of 16 and a base of 50: of the four frequencies some are kept, blended and stretched.
        "llama3": Recipe(
            LlamaConfig(
                **grouped, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
                rope_parameters=rope(
                    50.0, rope_type="llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=2.0,
                    original_max_position_embeddings=16,
                ),
            ),
            1.0, seed=44,
        ),
        "mistral": Recipe(
            MistralConfig(
                **heads16, rms_norm_eps=1e-5, rope_parameters=rope(2e4), sliding_window=6,
                tie_word_embeddings=False,
            ),
            1.0, seed=55,
        ),
        "qwen2": Recipe(
            Qwen2Config(
                **{**grouped, "num_hidden_layers": 3}, rms_norm_eps=1e-6, rope_parameters=rope(1e6),
                use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True,
            ),
            0.5, seed=66,
        ),
        "qwen3_moe": Recipe(
            Qwen3MoeConfig(
                **{**heads16, "num_hidden_layers": 3}, rms_norm_eps=1e-6, rope_parameters=rope(1e6),
                use_sliding_window=True, sliding_window=7, num_experts=8, num_experts_per_tok=2,
                moe_intermediate_size=12, norm_topk_prob=True,
            ),
            1.0, seed=144,
        ),
        "qwen3_yarn": Recipe(
            Qwen3Config(
                **heads16, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=True,
                rope_parameters=rope(
                    200.0, rope_type="yarn", factor=8.0, original_max_position_embeddings=32,
                    beta_fast=4.0, beta_slow=0.5,
                ),
            ),
            0.5, seed=77,
        ),
        "gemma2": Recipe(
            Gemma2Config(
                **{**heads16, "num_hidden_layers": 3}, rms_norm_eps=1e-5, rope_parameters=rope(2e3),
                sliding_window=5, query_pre_attn_scalar=9, attn_logit_softcapping=3.0,
                final_logit_softcapping=8.0,
            ),
            0.15, seed=88, norm=1.5,
        ),
        "gemma3": Recipe(
            Gemma3TextConfig(
                **{**heads16, "num_hidden_layers": 5}, rms_norm_eps=1e-5, sliding_window=5,
                query_pre_attn_scalar=20,
                layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
                rope_parameters={
                    "full_attention": rope(1e5, rope_type="linear", factor=8.0),
                    "sliding_attention": rope(300.0),
                },
            ),
            0.15, seed=99, norm=1.0,
        ),
        "smollm3": Recipe(
            SmolLM3Config(
                **{**grouped, "num_hidden_layers": 5}, rms_norm_eps=1e-6, rope_parameters=rope(2e6),
                no_rope_layer_interval=2, use_sliding_window=True, sliding_window=6, tie_word_embeddings=True,
            ),
            0.5, seed=111,
        ),
        "olmo2": Recipe(
            Olmo2Config(**grouped, rms_norm_eps=1e-6, rope_parameters=rope(5e5), tie_word_embeddings=False),
            1.0, seed=122,
        ),
        "phi3": Recipe(
            Phi3Config(
                **{**grouped, "hidden_size": 96, "num_attention_heads": 6}, rms_norm_eps=1e-5,
                original_max_position_embeddings=64, sliding_window=9, tie_word_embeddings=False,
                rope_parameters=rope(
                    1e4, rope_type="longrope", partial_rotary_factor=0.75,
                    short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5], long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
                ),
            ),
            1.0, seed=133,
        ),
    }  # fmt: skip


def randomise(model: PreTrainedModel, recipe: Recipe, rng: np.random.Generator) -> None:
    """Overwrite every parameter: matrices keep a signal's size, queries and keys attend sharply, norm
    weights lie around the recipe's figure, biases around 0, so that a forgotten or exchanged one shows in the
    logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.standard_normal(tuple(parameter.shape))
            if parameter.ndim == 1:
                values = (0.0 if name.endswith("bias") else recipe.norm) + 0.3 * values
            elif "embed_tokens" in name:
                values = values * recipe.embedding_scale
            else:
                gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.2
                values = values * gain / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.from_numpy(values))


def logits_of(model: PreTrainedModel, tokens: np.ndarray) -> torch.Tensor:
    """Logits [B, T, V] of int tokens [B, T], every position attended as real."""
    return model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits


def router_logits_of(model: PreTrainedModel, tokens: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Each layer's router logits [B * T, E]; none for a model without experts."""
    if not hasattr(model.config, "num_experts_per_tok"):
        return ()
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        return model(input_ids=ids, output_router_logits=True).router_logits


def clear_experts(model: PreTrainedModel, tokens: np.ndarray) -> bool:
    """Whether no choice of experts for `tokens` [B, T] hangs on rounding."""

    def margin(logits: torch.Tensor) -> float:
        kept = model.config.num_experts_per_tok
        best = logits.topk(kept + 1).values
        return float((best[:, kept - 1] - best[:, kept]).min())

    return all(margin(logits) >= ROUTER_MARGIN for logits in router_logits_of(model, tokens))


def clear_tokens(model: PreTrainedModel, rng: np.random.Generator) -> np.ndarray:
    """Random tokens int32 [2, 17] for which every choice of experts is clear; never id 0: torch withholds the
    gradient of the padding id's row of the embedding, a real gradient has it."""
    for _ in range(1000):
        tokens = rng.integers(1, VOCAB, (ROWS, LENGTH), dtype=np.int32)
        if clear_experts(model, tokens):
            return tokens
    raise RuntimeError("no tokens with clear choices of experts in 1000 tries; change the model's seed")


def balance(model: PreTrainedModel, tokens: np.ndarray) -> dict[str, Any]:
    """What transformers calls the load balancing loss, mean of its values for each layer alone, over the
    first `balance_lengths` tokens of each row; nothing for a model without experts."""
    layers = router_logits_of(model, tokens)
    if not layers:
        return {}
    lengths = np.array([LENGTH, LENGTH - 6], np.int32)
    real = torch.from_numpy(np.arange(LENGTH) < lengths[:, None])
    config = model.config
    each = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok, real)
        for logits in layers
    ]
    return {"balance": np.float32(np.mean([float(one) for one in each])), "balance_lengths": lengths}


def greedy(model: PreTrainedModel, prompt: np.ndarray) -> np.ndarray | None:
    """Continuation int32 [8] of `prompt` by repeated argmax; None where a choice is too close to call."""
    ids = prompt.tolist()
    for _ in range(CONTINUATION):
        with torch.no_grad():
            best = logits_of(model, np.array([ids]))[0, -1].topk(2)
        if float(best.values[0] - best.values[1]) < GREEDY_MARGIN:
            return None
        ids.append(int(best.indices[0]))
    if not clear_experts(model, np.array([ids])):
        return None
    return np.array(ids[len(prompt) :], np.int32)


def clear_prompt(model: PreTrainedModel, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A prompt int32 [5] with a clear greedy continuation of at least 5 different tokens, and that."""
    for _ in range(1000):
        prompt = rng.integers(3, VOCAB, PROMPT, dtype=np.int32)
        continuation = greedy(model, prompt)
        if continuation is not None and len(set(continuation.tolist())) >= DISTINCT:
            return prompt, continuation
    raise RuntimeError("no prompt with a clear greedy continuation in 1000 tries; change the model's seed")


def gradients(model: PreTrainedModel, tokens: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """d sum(logits * weights) / d parameter: the norm of each, and the arrays of the ones in GRADIENTS."""
    model.zero_grad()
    (logits_of(model, tokens) * torch.from_numpy(weights.astype(np.float32))).sum().backward()
    arrays: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            arrays |= stored(name, parameter.grad.numpy())
    norms = {f"gradient_norm/{name}": np.float32(np.linalg.norm(value)) for name, value in arrays.items()}
    return norms | {f"gradient/{name}": arrays[name] for name in GRADIENTS if name in arrays}


def stored(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """A parameter under the names that checkpoints have: all experts are one tensor in transformers' module,
    gate and up stacked, and three tensors each in a checkpoint."""
    prefix, kind = name.rsplit(".", 1)
    if not prefix.endswith("mlp.experts"):
        return {name: value}
    parts = {kind: value}
    if kind == "gate_up_proj":
        gate, up = np.split(value, 2, axis=1)
        parts = {"gate_proj": gate, "up_proj": up}
    return {
        f"{prefix}.{expert}.{part}.weight": array
        for part, stacked in parts.items()
        for expert, array in enumerate(stacked)
    }


def rounding(model: PreTrainedModel, tokens: np.ndarray, logits: np.ndarray) -> float:
    """Largest distance of float32 logits from the same model's in float64: the noise of the reference."""
    with torch.no_grad():
        exact = logits_of(model.double(), tokens).numpy()
    return float(np.abs(exact - logits).max())


def write_older_config(folder: Path) -> None:
    """`config.older.json`: the same model as older releases of transformers wrote it."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw["rope_scaling"] = None
    raw["torch_dtype"] = raw.pop("dtype")
    raw["transformers_version"] = "4.45.0"
    del raw["head_dim"]  # older configs leave it to hidden_size / num_attention_heads
    (folder / "config.older.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def make_parity(name: str, recipe: Recipe) -> None:
    """Write tests/golden/parity/<name>/: the model, and expected.npz."""
    rng = np.random.default_rng(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config).float().eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    randomise(model, recipe, rng)
    folder = GOLDEN / "parity" / name
    model.save_pretrained(folder)
    if name == "llama":
        write_older_config(folder)
    tokens = clear_tokens(model, rng)
    weights = rng.integers(-3, 4, (ROWS, LENGTH, VOCAB), dtype=np.int8)  # small integers pack well
    prompt, continuation = clear_prompt(model, rng)
    with torch.no_grad():
        logits = logits_of(model, tokens).numpy()
    np.savez_compressed(
        folder / "expected.npz", tokens=tokens, logits=logits, prompt=prompt, greedy=continuation,
        logit_weights=weights, **gradients(model, tokens, weights), **balance(model, tokens),
    )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{name}: logits std {logits.std():.2f}, float32 rounding {rounding(model, tokens, logits):.1e}, "
        f"greedy {continuation.tolist()}, {size / 1000:.0f} kB"
    )


def multilingual_ids(folder: Path) -> list[int]:
    """The first 40 ids of the multilingual text, as plain content."""
    ids = AutoTokenizer.from_pretrained(folder)(MULTILINGUAL, add_special_tokens=False)["input_ids"]
    return list(ids[:MULTILINGUAL_LENGTH])


def make_smollm2(folder: Path) -> PreTrainedModel:
    """Write tests/golden/smollm2/expected.npz and return the float32 model.

    Rows are right-padded with 0 to T; `lengths` says how much of each is real. `next_logprob[b, t]` is
    log p(tokens[b, t + 1] | tokens[b, : t + 1]), NaN where there is no next token.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = [list(RECORDED_IDS), multilingual_ids(folder)]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    tokens = np.zeros((len(sequences), int(lengths.max())), np.int32)
    columns = np.arange(0, model.config.vocab_size, COLUMN_STEP, dtype=np.int32)
    shape = tokens.shape
    kept: dict[str, Any] = {
        "logits": np.zeros((*shape, len(columns)), np.float32),
        "logsumexp": np.full(shape, np.nan, np.float32),
        "next_logprob": np.full(shape, np.nan, np.float32),
        "top_ids": np.zeros((*shape, TOP), np.int32),
        "top_logits": np.zeros((*shape, TOP), np.float32),
    }
    for row, ids in enumerate(sequences):
        n = len(ids)
        tokens[row, :n] = ids
        with torch.no_grad():
            logits = logits_of(model, np.array([ids]))[0]
        best = logits.topk(TOP)
        kept["logits"][row, :n] = logits[:, columns].numpy()
        kept["logsumexp"][row, :n] = logits.logsumexp(-1).numpy()
        kept["next_logprob"][row, : n - 1] = next_logprobs(logits, ids).numpy()
        kept["top_ids"][row, :n] = best.indices.numpy()
        kept["top_logits"][row, :n] = best.values.numpy()
    path = GOLDEN / "smollm2" / "expected.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, tokens=tokens, lengths=lengths, columns=columns, **kept)
    print(f"smollm2: {int(lengths.sum())} tokens, {path.stat().st_size / 1000:.0f} kB")
    return model


def next_logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """log p of ids[1:] under logits [T, V] of the positions before each."""
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def recorded_difference(model: PreTrainedModel, reply: Path) -> float:
    """Largest distance of the logprobs in one recorded single SGLang scoring reply from the model's."""
    record = json.loads(reply.read_text())
    ids = record["request"]["input_ids"]
    recorded = torch.tensor(
        [entry[0] for entry in record["response"]["meta_info"]["input_token_logprobs"][1:]]
    )
    with torch.no_grad():
        mine = next_logprobs(logits_of(model, np.array([ids]))[0], ids)
    return float((mine - recorded).abs().max())


def compare_recorded(model: PreTrainedModel, replies: list[Path]) -> None:
    """Print how far each recorded reply is from these weights, as they are and rounded to bfloat16.

    The recording server had loaded a bfloat16 copy of the same file, so the second figure is the one
    that judges the conversion; the first shows what that rounding alone costs.
    """
    exact = [recorded_difference(model, reply) for reply in replies]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    for reply, difference in zip(replies, exact, strict=True):
        rounded = recorded_difference(model, reply)
        print(
            f"{reply}: max abs logprob difference {difference:.1e}, weights rounded to bfloat16 {rounded:.1e}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the parity fixtures from transformers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="tiny models to make (default: all)")
    parser.add_argument("--smollm2", type=Path, help="the folder written by scripts/fetch_smollm2.py")
    parser.add_argument(
        "--recorded", type=Path, nargs="*", default=[], help="recorded SGLang scoring replies"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that a second run writes the same numbers
    if options.smollm2 is None:
        known = recipes()
        if unknown := set(options.names) - known.keys():
            parser.error(f"no model is called {min(unknown)!r}; there are {', '.join(known)}")
        for name in options.names or known:
            make_parity(name, known[name])
        return
    model = make_smollm2(options.smollm2)
    compare_recorded(model, options.recorded)


if __name__ == "__main__":
    main()
