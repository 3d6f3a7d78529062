"""Three training steps on one device and on eight give the same losses and parameters."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("three_steps.py")
ABOUT_THE_RUN = ("devices", "sharded_parameters", "largest_gathered")
EXPERTS_OF_A_LAYER = math.prod((8, 32, 24))  # elements of one of the three kernels in three_steps.py


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """What a model gives on one device, each run once."""
    found = {}

    def of(model: str) -> dict[str, np.ndarray]:
        if model not in found:
            found[model] = run(tmp_path_factory.mktemp(model) / "out.npz", model, 1, "1,1,1,1")
        return found[model]

    return of


def run(out: Path, model: str, devices: int, mesh: str) -> dict[str, np.ndarray]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    subprocess.run([sys.executable, str(WORKER), model, mesh, str(out)], env=environment, check=True)
    return dict(np.load(out))


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("dense", "1,8,1,1"),
        ("dense", "1,4,1,2"),
        ("dense", "2,2,1,2"),
        ("experts", "1,8,1,1"),
        ("experts", "1,2,4,1"),
        ("experts", "1,2,2,2"),
    ],
)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(one_device, tmp_path, model, mesh):
    many, one = run(tmp_path / "out.npz", model, 8, mesh), one_device(model)
    assert many.keys() == one.keys()
    assert int(many["devices"]) == 8 and int(one["devices"]) == 1
    for name, value in one.items():
        if name not in ABOUT_THE_RUN:
            np.testing.assert_allclose(many[name], value, atol=1e-5, err_msg=name)
    assert many["sharded_parameters"] > 5  # the mesh is used, not just present
    assert many["sampler_recompiles"] == 0  # smaller batches lie as they were compiled for
    if model == "experts":
        # Without the axis every device has all experts in its hands at some time, with it never.
        spread = mesh.split(",")[2] != "1"
        assert (many["largest_gathered"] < EXPERTS_OF_A_LAYER) == spread
