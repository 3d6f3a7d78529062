"""Run by test_step_devices.py in a process of its own: `three_steps.py MODEL MESH OUT.npz [sample]`.

Three training steps of MODEL (dense, experts, lora) on MESH (`data,fsdp,expert,tensor`); with `sample` the
trained policy samples. Beside it a checkpoint is loaded onto the mesh, and the compiled step is read.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxdistill.batch import Batch
from jaxdistill.compiles import CompileCounter
from jaxdistill.losses import head
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.parallel import MeshConfig, make_mesh, param_shardings, place_batch
from jaxdistill.parallel.rules import rows_sharding
from jaxdistill.samplers import Generator, sampling_params
from jaxdistill.step import TrainState, initial_state, make_train_step
from jaxdistill.students import Decoder, LoraConfig, load_decoder, parse_config
from tests.devices.compiled_text import collectives

VOCAB = 96  # no other axis of the model has as many, or half as many, elements
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
CONFIGS = {
    "dense": parse_config(SHAPE | {"model_type": "qwen3"}, where="the test"),
    "experts": parse_config(SHAPE | EXPERTS | {"model_type": "qwen3_moe"}, where="the test"),
}
CONFIGS["lora"] = CONFIGS["dense"]
# A checkpoint with several parameters in one tensor, and one with a parameter in several.
CHECKPOINTS = {"dense": "phi3", "experts": "qwen3_moe", "lora": "llama"}
PARITY = Path(__file__).parents[1] / "golden" / "parity"
ROWS, LENGTH, TILE = 8, 40, 20


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    response = np.zeros((ROWS, LENGTH), bool)
    response[:, 5:] = True
    chunk = np.where(response, (np.arange(LENGTH)[None] - 5) // 2, -1).astype(np.int32)
    teacher = rng.uniform(-6, 0, (ROWS, LENGTH)).astype(np.float32)
    return Batch(
        tokens=rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        response_mask=response,
        loss_mask=response,
        behavior_logprobs=np.where(response, -4.0, 0.0).astype(np.float32),
        chunk_of_token=chunk,
        teacher_logprob=np.where(response, teacher, 0.0).astype(np.float32),
        policy_version=np.zeros(ROWS, np.int32),
        weight=np.ones(ROWS, np.float32),
        same_vocabulary=np.zeros(ROWS, bool),
        origin=np.zeros(ROWS, np.int32),
        reward=np.zeros(ROWS, np.float32),
    )


def sample(graphdef, params, mesh) -> tuple[np.ndarray, int]:
    """16 prompts of different lengths, two samples each, in segments that rows leave: ids [32, 24], and how
    many programs the second of two calls compiled."""
    tokens = np.random.default_rng(9).integers(0, VOCAB, (16, 5)).astype(np.int32)
    lengths = (1 + np.arange(16) % 5).astype(np.int32)
    generator = Generator(graphdef, mesh=mesh, ahead=True, segment=6)
    split = jax.jit(lambda key: jax.random.split(key, 32), out_shardings=rows_sharding(mesh))
    compiles = CompileCounter()

    def draw(limits: np.ndarray) -> np.ndarray:
        keys = split(jax.random.key(4))
        limits = limits.astype(np.int32)
        settings = {"samples": 2, "max_new_tokens": 24, "stop_ids": (3,)}
        return generator(params, tokens, lengths, limits, keys, sampling_params(1.0), **settings).tokens

    draw(np.full(16, 24))
    before = compiles.programs
    drawn = draw(np.where(np.arange(16) % 5 == 0, 24, 6))  # most leave after one segment
    return drawn, compiles.programs - before


def bytes_of_device(arrays: Any) -> int:
    """What one device holds of them."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays))


def misplaced_moments(state: TrainState) -> int:
    """How many of Adam's moments do not lie as their parameters do."""
    moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
    alike = jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), moments, [state.params] * 2
    )
    return sum(not one for one in jax.tree.leaves(alike))


def main(model: str, sizes: str, out: str, *more: str) -> None:
    config, lora = CONFIGS[model], LoraConfig(rank=8) if model == "lora" else None
    data, fsdp, expert, tensor = (int(size) for size in sizes.split(","))
    head.TILE_LOGITS = VOCAB * TILE  # of one row, which is what each of eight devices has
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor))
    rows = rows_sharding(mesh, 3)
    variables = nnx.state(Decoder(config, rngs=nnx.Rngs(0), lora=lora), nnx.Param)
    graphdef = nnx.split(Decoder(config, rngs=nnx.Rngs(0), activation_sharding=rows, lora=lora))[0]
    placed = jax.device_put(nnx.to_pure_dict(variables), param_shardings(variables, mesh))
    decoder = nnx.merge(graphdef, placed)
    # A large epsilon: Adam turns rounding of a zero gradient into a full step, which is not the
    # sharding's doing.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3), 10)
    state, frozen = initial_state(decoder, optimizer, mesh)
    objective = ReverseKL(ReverseKLConfig(credit="lookahead"))
    step = make_train_step(graphdef, objective, optimizer, state, mesh, router_aux_coefficient=0.1)
    compiled = step.lower(state, frozen, place_batch(make_batch(0), mesh)).compile()
    held = bytes_of_device(state)
    losses = []
    for number in range(3):
        state, metrics = compiled(state, frozen, place_batch(make_batch(number), mesh))
        losses.append([metrics[name].value for name in ("loss", "router_balance") if name in metrics])
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    sharded = sum(not leaf.sharding.is_fully_replicated for _, leaf in leaves)
    loaded = nnx.state(load_decoder(PARITY / CHECKPOINTS[model], mesh=mesh, lora=lora), nnx.Param)
    leaves += jax.tree_util.tree_leaves_with_path({"loaded": nnx.to_pure_dict(loaded)})
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    if more == ("sample",):
        sampled = sample(graphdef, frozen | state.params, mesh)
        arrays["sampled"], arrays["sampler_recompiles"] = map(np.asarray, sampled)
    np.savez(
        out,
        losses=np.array(losses),
        devices=np.array(len(jax.devices())),
        sharded_parameters=np.array(sharded),
        collectives=np.array(json.dumps(collectives(compiled.as_text()))),
        held=np.array(held),
        aliased=np.array(compiled.memory_analysis().alias_size_in_bytes),
        misplaced_moments=np.array(misplaced_moments(state)),
        **arrays,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
