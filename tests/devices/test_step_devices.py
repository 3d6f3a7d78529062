"""Three training steps on one device and on eight give the same losses and parameters, and the compiled step
moves and keeps no more than it must."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.devices.compiled_text import Collective
from tests.devices.workers import run_worker

pytestmark = pytest.mark.slow

# Meshes that use every axis of theirs: here the policy samples, too.
FULL = {"dense": "2,2,1,2", "experts": "1,2,2,2"}
ABOUT_THE_RUN = {"devices", "sharded_parameters", "collectives", "held", "aliased", "misplaced_moments"}
VOCAB, HIDDEN = 96, 32
EXPERTS_OF_A_LAYER = math.prod((8, 32, 24))  # elements of one of the three kernels in three_steps.py


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """What a model gives on one device, each run once."""
    found = {}

    def of(model: str) -> dict[str, np.ndarray]:
        if model not in found:
            out = tmp_path_factory.mktemp(model) / "out.npz"
            found[model], _ = run(out, model, 1, "1,1,1,1", *["sample"] * (model in FULL))
        return found[model]

    return of


def run(out: Path, model: str, devices: int, mesh: str, *more: str) -> tuple[dict[str, np.ndarray], str]:
    """What three_steps.py found, and the compiler's complaints."""
    complaints = run_worker("three_steps", model, mesh, out, *more, devices=devices)
    return dict(np.load(out)), complaints


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("dense", "1,8,1,1"),
        ("dense", "1,4,1,2"),
        ("dense", "2,2,1,2"),
        ("experts", "1,8,1,1"),
        ("experts", "1,2,4,1"),
        ("experts", "1,2,2,2"),
        ("lora", "1,4,1,2"),
    ],
)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(one_device, tmp_path, model, mesh):
    more, one = ["sample"] if mesh == FULL.get(model) else [], one_device(model)
    many, complaints = run(tmp_path / "out.npz", model, 8, mesh, *more)
    assert many.keys() == one.keys() - (set() if more else {"sampled", "sampler_recompiles"})
    assert int(many["devices"]) == 8 and int(one["devices"]) == 1
    for name in many.keys() - ABOUT_THE_RUN:
        np.testing.assert_allclose(many[name], one[name], atol=1e-5, err_msg=name)
    assert many["sharded_parameters"] > 5  # the mesh is used, not just present
    assert many.get("sampler_recompiles", 0) == 0  # smaller batches lie as they were compiled for
    assert "rematerialization" not in complaints  # nothing is replicated for want of a better way
    # The state is updated where it lies, its moments as spread as the parameters.
    assert many["misplaced_moments"] == 0
    data, fsdp, _, tensor = map(int, mesh.split(","))
    # All axes but `data` split parameters; of adapters one side alone lies along `tensor`.
    parts = fsdp if model == "lora" else 8 / data
    assert many["held"] < 1.1 * one["held"] / parts
    assert many["aliased"] >= many["held"] and one["aliased"] >= one["held"]
    found = [
        Collective(kind, tuple(map(tuple, shapes)), looped)
        for kind, shapes, looped in json.loads(str(many["collectives"]))
    ]
    check_vocabulary(found, tensor, frozen=model == "lora")
    if model == "experts":
        # Without the axis every device has all experts in its hands at some time, with it never.
        spread = mesh.split(",")[2] != "1"
        largest = max(each.largest for each in found if each.kind == "all-gather")
        assert (largest < EXPERTS_OF_A_LAYER) == spread


def check_vocabulary(found: list[Collective], tensor: int, *, frozen: bool) -> None:
    """Of what is as wide as the vocabulary, matrices alone travel, none of them in a loop, and a gradient of
    them only where they are trained."""
    widths = {VOCAB, VOCAB // tensor}
    wide = [(each.kind, shape, each.looped) for each in found for shape in each.shapes if widths & set(shape)]
    assert frozen == ({kind for kind, *_ in wide} == {"all-gather"})
    for _, shape, looped in wide:
        assert len(shape) == 2 and math.prod(shape) <= VOCAB // tensor * HIDDEN and not looped, shape
