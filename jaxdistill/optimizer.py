"""AdamW with a warm-up, a cosine or constant schedule, and clipping by global norm."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.moments import MomentDtype, scale_by_adam


class OptimizerConfig(StrictConfig):
    """`learning_rate` is the highest, reached after `warmup_steps` of a linear rise; then the `schedule` is a
    cosine to the run's last step, or constant. `final_fraction` is the share of the peak rate left at the
    last step of a cosine. `b1`, `b2`, `eps` and `weight_decay` are AdamW's. `clip_norm` is the largest global
    L2 norm of a gradient; longer ones are scaled down to it. An update's rows are read in
    `gradient_accumulation_steps` parts, one after the other: the same update in less memory.
    `moment_dtype` is what Adam's two moments are kept in between steps (`jaxdistill.moments`): 8 bytes a
    parameter in float32, 4 in bfloat16, 2 in int8. An update whose loss or gradient is not finite is skipped;
    more than `max_skipped` of them in a row end the run."""

    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    moment_dtype: MomentDtype = "float32"
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_skipped: int = Field(default=3, ge=0)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate at each of `steps` update steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    if not warmup:
        return after
    # The first update already moves: the ramp starts one increment above zero.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW (Loshchilov & Hutter 2019, algorithm 2); norm scales and biases are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            scale_by_adam(config.b1, config.b2, config.eps, config.moment_dtype),
            optax.add_decayed_weights(config.weight_decay, _decayed),
            optax.scale_by_learning_rate(learning_rate(config, steps)),
        ),
    )


def updates_made(opt_state: Any) -> Float32[Array, ""] | None:
    """How many updates an optimizer's state has made, which schedules count by; None where it does not count
    (`make_optimizer`'s does)."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return counts[0][1].astype(jnp.float32) if counts else None


def _decayed(params: Any) -> Any:
    """True for the parameters that weight decay applies to. Told by name: the norm scales of all
    layers are stacked into matrices, so the number of axes does not tell."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not jax.tree_util.keystr(path[-1:]).rstrip("']").endswith(("norm", "bias")), params
    )
