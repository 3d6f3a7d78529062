"""The tiled head on eight devices: the numbers of one device, and what travels between them."""

import json

import pytest

from tests.devices.compiled_text import Collective
from tests.devices.workers import run_worker

pytestmark = pytest.mark.slow

DATA, FSDP, EXPERT, TENSOR = MESH = (2, 2, 1, 2)
SORTS = {"uld"}  # by probability, which takes the whole vocabulary


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "out.json"
    run_worker("head_on_mesh", ",".join(map(str, MESH)), out, devices=8)
    return json.loads(out.read_text())


def collectives(entry) -> list[Collective]:
    return [
        Collective(each["kind"], tuple(map(tuple, each["shapes"])), each["looped"])
        for each in entry["collectives"]
    ]


def test_eight_devices_give_values_metrics_and_gradients_of_one(found):
    assert len(found) > 3
    for name, entry in found.items():
        assert entry["apart"] < 1e-5, name
        assert entry["gradient"] > 1e-3, name


def test_logits_stay_on_the_devices_that_made_them(found):
    """[B, C] and [B, C, K] travel between devices that share the vocabulary, [B, C, V] only to be sorted."""
    for name, entry in found.items():
        tile = entry["tile_logits"] // TENSOR
        largest = max(each.largest for each in collectives(entry) if each.looped)
        assert (largest >= tile) == (name in SORTS), (name, largest)


def test_the_matrix_is_gathered_once_and_its_gradient_reduced_once(found):
    vocabulary, hidden = next(iter(found.values()))["matrix"]
    split = vocabulary // TENSOR
    for name, entry in found.items():
        travels = [
            (each.kind, shape, each.looped)
            for each in collectives(entry)
            for shape in each.shapes
            if len(shape) == 2 and set(shape) & {vocabulary, split}
        ]
        assert sorted(travels) == [
            ("all-gather", (split, hidden), False),
            ("all-reduce", (split, hidden // FSDP), False),  # over `data`, of what is scattered
            ("reduce-scatter", (split, hidden // FSDP), False),
        ], name
