"""Run by test_head_devices.py in a process of its own: `head_on_mesh.py MESH OUT.json`.

Some objectives through the tiled head, on one device and on MESH (`data,fsdp,expert,tensor`): how far the
two are apart, and the collectives of the program on the mesh.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxdistill.losses import evaluate_objective, head
from jaxdistill.parallel import MeshConfig, make_mesh, place_batch
from jaxdistill.parallel.mesh import AXES
from jaxdistill.parallel.rules import partition
from tests.devices.compiled_text import collectives
from tests.unit.losses.batches import HIDDEN, ROWS, VOCAB, make_batch, on_device
from tests.unit.losses.cases import CASES

NAMES = ("projected", "gkd 0.5", "alm", "sum", "uld")
LENGTH, TILE = 30, 15


def main(sizes: str, out: str) -> None:
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, map(int, sizes.split(",")), strict=True))))
    batch = on_device(make_batch(length=LENGTH))
    hidden = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, HIDDEN))
    matrix = jax.random.normal(jax.random.key(2), (VOCAB, HIDDEN))
    spec = partition(matrix.shape, ("vocab", "embed"), mesh)
    placed = place_batch(hidden, mesh), jax.device_put(matrix, NamedSharding(mesh, spec))
    head.TILE_LOGITS = VOCAB * TILE  # of one row, which is what a device of the mesh has
    found = {}
    for name in NAMES:
        objective = CASES[name]
        prepared = objective.prepare(batch)

        def run(hidden, matrix, targets, mesh=None, objective=objective, prepared=prepared):
            def value(hidden, matrix):
                part = type(prepared)(targets, prepared.weight, {})
                result = evaluate_objective(objective, part, hidden, matrix, mesh=mesh)
                return result.objective.total / result.objective.weight, result.metrics

            return jax.value_and_grad(value, (0, 1), has_aux=True)(hidden, matrix)

        one = jax.jit(run)(hidden, matrix, prepared.targets)
        targets = place_batch(prepared.targets, mesh)
        compiled = jax.jit(run, static_argnums=3).lower(*placed, targets, mesh).compile()
        many = compiled(*placed, targets)
        apart = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), one, many)
        found[name] = {
            "apart": max(jax.tree.leaves(apart)),
            "gradient": float(jnp.abs(one[1][1]).max()),
            "matrix": matrix.shape,
            "tile_logits": TILE * VOCAB,
            "collectives": [each._asdict() for each in collectives(compiled.as_text())],
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
