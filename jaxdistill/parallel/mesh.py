"""The device mesh: `data`, `fsdp` and `expert` split rows; `fsdp`, `expert` and `tensor` split parameters."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.parallel.rules import row_shards, rows_sharding

AXES = ("data", "fsdp", "expert", "tensor")


class MeshConfig(StrictConfig):
    """Sizes of the mesh axes; one of them may be -1, which takes all devices the others leave.

    `data` splits a batch's rows alone; `fsdp` splits parameters too, `tensor` the parameters within a layer.
    `expert` is for students with experts: each of its devices holds some of them, and everything else is
    split over it as over `fsdp`."""

    data: int = Field(default=1, ge=-1)
    fsdp: int = Field(default=-1, ge=-1)
    expert: int = Field(default=1, ge=-1)
    tensor: int = Field(default=1, ge=-1)


def find_devices() -> Sequence[Any]:
    """All devices of the run. Raises `ConfigError` where JAX has none of the kind it was told to use."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second is what it has for a plugin not installed
        asked = os.environ.get("JAX_PLATFORMS", "")
        said = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise ConfigError(
            f"JAX finds no device for JAX_PLATFORMS={asked}{said}; install its plugin into this environment "
            "(pip install 'jaxdistill[cuda13]', or cuda12, tpu) and see that the driver works, or unset "
            "JAX_PLATFORMS to take what there is"
        ) from error


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange `devices` (default: all) as [data, fsdp, expert, tensor].

    Raises `ConfigError` when the sizes do not multiply to the number of devices, and where processes would
    share rows.
    """
    devices = find_devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if 0 in sizes or sizes.count(-1) > 1:
        raise ConfigError(f"{asked}: sizes are at least 1, and at most one may be -1 (all that is left)")
    known = math.prod(size for size in sizes if size > 0)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"{asked} does not fit {len(devices)} {devices[0].platform} device(s): the sizes must multiply "
            "to their number, where -1 takes what the others leave"
        )
    mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if jax.process_count() > 1:
        _check_processes(mesh, asked)
    return mesh


def _check_processes(mesh: Mesh, asked: str) -> None:
    """Each process makes its own rows, so its devices must hold rows that no other process has."""
    shards, processes = row_shards(mesh), jax.process_count()
    own = len(set(map(str, rows_sharding(mesh).addressable_devices_indices_map((shards,)).values())))
    if own * processes != shards:
        raise ConfigError(
            f"{asked}: rows are split over {shards} parts, and the {jax.local_device_count()} devices of "
            f"this process have {own} of them; expected {shards}/{processes} that no other process has. Make "
            "mesh.tensor divide the devices of one process"
        )
