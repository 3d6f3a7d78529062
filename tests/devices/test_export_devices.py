"""An export on eight devices: no device and no host holds the model, and the files are right."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.devices.workers import ROOT, run_worker


def test_an_export_is_spread_over_the_devices_until_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "model"
    run_worker("export_run", tmp_path / "run", out, devices=8)
    held = json.loads(Path(f"{out}.json").read_text())
    matrices = {name: one for name, one in held.items() if "norm" not in name}
    assert matrices
    for name, (_, size, shards, largest) in matrices.items():
        assert (shards, largest) == (8, size // 8), name
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, ROOT / "assets/toy/student"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.astype(np.float32), err_msg=name)
