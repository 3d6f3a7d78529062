"""Run by test_step_devices.py in a process of its own: `three_steps.py data,fsdp,tensor OUT.npz`.

Three training steps, then the trained policy samples.
"""

import sys

import jax
import numpy as np
from flax import nnx

from jaxdistill.batch import Batch
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.parallel import MeshConfig, make_mesh, place_batch, place_params
from jaxdistill.parallel.rules import rows_sharding
from jaxdistill.samplers import generate
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder, DecoderConfig

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, 1e4, 1e-6, 64, False, True)
ROWS, LENGTH = 8, 16


def make_batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    response = np.zeros((ROWS, LENGTH), bool)
    response[:, 5:] = True
    chunk = np.where(response, (np.arange(LENGTH)[None] - 5) // 2, -1).astype(np.int32)
    teacher = rng.uniform(-6, 0, (ROWS, LENGTH)).astype(np.float32)
    return Batch(
        tokens=rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32),
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


def sample(graphdef, params, mesh) -> np.ndarray:
    """16 prompts of different lengths, two samples each: ids [32, 6]."""
    tokens = np.random.default_rng(9).integers(0, 64, (16, 5)).astype(np.int32)
    lengths = (1 + np.arange(16) % 5).astype(np.int32)

    @jax.jit
    def run(params, tokens, lengths):
        keys = jax.random.split(jax.random.key(4), 32)
        return generate(
            nnx.merge(graphdef, params),
            tokens,
            lengths,
            keys,
            samples=2,
            max_new_tokens=6,
            temperature=np.float32(1.0),
            stop_ids=(3,),
        )

    return np.asarray(run(params, *place_batch((tokens, lengths), mesh)).tokens)


def main(sizes: str, out: str) -> None:
    data, fsdp, tensor = (int(size) for size in sizes.split(","))
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    graphdef, variables = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
    graphdef = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), activation_sharding=rows_sharding(mesh, 3)))[0]
    decoder = nnx.merge(graphdef, place_params(nnx.to_pure_dict(variables), variables, mesh))
    # A large epsilon: Adam turns rounding of a zero gradient into a full step, which is not the
    # sharding's doing.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3), 10)
    state = initial_state(decoder, optimizer, mesh)
    step = make_train_step(graphdef, ReverseKL(ReverseKLConfig(credit="lookahead")), optimizer, state, mesh)
    losses = []
    for number in range(3):
        state, metrics = step(state, place_batch(make_batch(number), mesh))
        losses.append(metrics["loss"].value)
    sampled = sample(graphdef, state.params, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    sharded = sum(not leaf.sharding.is_fully_replicated for _, leaf in leaves)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(
        out,
        losses=np.array(losses),
        sampled=sampled,
        devices=np.array(len(jax.devices())),
        sharded_parameters=np.array(sharded),
        **arrays,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
