"""What a device can do at most, and which seconds count on it."""

from typing import Literal, NamedTuple

import jax
from measure import Seconds


class Peak(NamedTuple):
    """`flops`: of dense products in bfloat16, a second. `bandwidth`: bytes of its memory, a second."""

    flops: float
    bandwidth: float


# By jax's `device_kind`, from the vendor's data sheets (without sparsity).
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),  # SXM
    "NVIDIA H200": Peak(989e12, 4.8e12),
}


def platform() -> Literal["cpu", "accelerator"]:
    """What jax computes on: which shapes are worth a measurement there, and which seconds."""
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"


def peak(of: Literal["flops", "bandwidth"], given: float | None) -> float:
    """Of the device jax computes on; what is `given` (--peak-flops, --peak-bandwidth) goes before what is
    listed. Raises `SystemExit` where it is neither."""
    if given is not None:
        return given
    kind = jax.devices()[0].device_kind
    if kind not in PEAKS:
        raise SystemExit(
            f"benchmarks/devices.py lists {' and '.join(map(repr, PEAKS))}, and jax computes on {kind!r}; "
            f"say --peak-{of}, from its data sheet"
        )
    return getattr(PEAKS[kind], of)


def spent(seconds: Seconds) -> float:
    """The CPU's seconds where that computes, else the wall's."""
    return seconds.cpu if platform() == "cpu" else seconds.wall
