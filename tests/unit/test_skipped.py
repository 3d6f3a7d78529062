"""Updates that are not finite: nothing moves, they are counted, and their batches are kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdistill.errors import DataError, NonFiniteError
from jaxdistill.losses.reverse_kl import ReverseKL, ReverseKLConfig
from jaxdistill.optimizer import OptimizerConfig, make_optimizer, updates_made
from jaxdistill.parallel import MeshConfig, make_mesh, place_batch
from jaxdistill.skipped import SkippedBatches, load_batch, save_batch
from jaxdistill.step import initial_state, make_train_step
from jaxdistill.students import Decoder
from tests.unit.losses.batches import make_batch
from tests.unit.test_step import CONFIG

OBJECTIVE = ReverseKL(ReverseKLConfig(credit="lookahead", baseline="none"))
SOUND = {"skipped": 0.0, "loss": 1.0, "grad_norm": 1.0}
BROKEN = {"skipped": 1.0, "loss": float("nan"), "grad_norm": float("inf")}


def broken_batch():
    """One token whose log-probability of long ago is nonsense: loss and gradient become NaN."""
    batch = make_batch()
    behavior = batch.behavior_logprobs.copy()
    row, token = np.argwhere(batch.loss_mask & (batch.origin == 0)[:, None])[3]
    behavior[row, token] = np.nan
    return replace(batch, behavior_logprobs=behavior)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_parameters_and_moments_keep_every_bit(moments: str):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)[0]
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, moment_dtype=moments), 10
    )
    state, frozen = initial_state(Decoder(CONFIG, rngs=nnx.Rngs(0)), optimizer, mesh)
    step = make_train_step(graphdef, OBJECTIVE, optimizer, state, mesh)
    state, metrics = step(state, frozen, place_batch(make_batch(), mesh))
    assert metrics["skipped"].value == 0 and metrics["updates"].value == 0
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, frozen, place_batch(broken_batch(), mesh))
    assert metrics["skipped"].value == 1 and not np.isfinite(metrics["loss"].value)
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == y.tobytes(), state[1:], before[1:])
    assert jax.tree.all(same) and int(state.step) == 2
    state, metrics = step(state, frozen, place_batch(make_batch(1), mesh))
    assert metrics["skipped"].value == 0 and metrics["updates"].value == 1
    assert updates_made(state.opt_state) == 2  # the schedule counts updates, not steps
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), state.params, before.params)
    assert all(jax.tree.leaves(moved["layers"]))
    assert np.isfinite(optax.tree.norm(state.params))


def test_only_so_many_in_a_row(tmp_path):
    skipped = SkippedBatches(tmp_path / "skipped", most=2)
    for step, values in enumerate([BROKEN, BROKEN, SOUND, BROKEN, BROKEN]):
        skipped.note(step, make_batch(step), values)
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan.*3 updates in a row.*max_skipped=2"):
        skipped.note(5, make_batch(5), BROKEN)
    kept = sorted(path.name for path in skipped.folder.iterdir())
    assert kept == ["step-00000003.npz", "step-00000004.npz", "step-00000005.npz"]


def test_a_batch_set_aside_gives_the_same_loss_again(tmp_path):
    for batch in (broken_batch(), replace(make_batch(), model_logprobs=make_batch().behavior_logprobs)):
        save_batch(tmp_path / "batch.npz", batch)
        again = load_batch(tmp_path / "batch.npz")
        assert jax.tree.structure(again) == jax.tree.structure(batch)
        for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        device = jax.tree.map(jnp.asarray, again)
        assert OBJECTIVE.prepare(device).targets["mask"].any()


def test_another_file_is_no_batch(tmp_path):
    (tmp_path / "text").write_text("nothing")
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    for name in ("text", "other.npz", "none"):
        with pytest.raises(DataError, match=name):
            load_batch(tmp_path / name)
