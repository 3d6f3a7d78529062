"""Three steps on one device and on eight virtual ones: the same losses and parameters."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("three_steps.py")


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "out.npz", 1, "1,1,1")


def run(out: Path, devices: int, mesh: str) -> dict[str, np.ndarray]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    subprocess.run([sys.executable, str(WORKER), mesh, str(out)], env=environment, check=True)
    return dict(np.load(out))


@pytest.mark.parametrize("mesh", ["1,8,1", "1,4,2", "2,2,2"])
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(one_device, tmp_path, mesh):
    many = run(tmp_path / "out.npz", 8, mesh)
    assert many.keys() == one_device.keys()
    assert int(many["devices"]) == 8 and int(one_device["devices"]) == 1
    for name, value in one_device.items():
        if name not in ("devices", "sharded_parameters"):
            np.testing.assert_allclose(many[name], value, atol=1e-5, err_msg=name)
    assert many["sharded_parameters"] > 5  # the mesh is used, not just present
