"""Run by test_export_devices.py in a process of its own: `export_run.py RUN OUT`.

A checkpoint of the shipped student as it is, exported: prints (to OUT.json) how much of each parameter one
device and the host hold when the files are written.
"""

import json
import sys
from pathlib import Path

import jax
from flax import nnx

from jaxdistill import export, students
from jaxdistill.checkpoint import CheckpointConfig, Checkpoints
from jaxdistill.config import dump, load
from jaxdistill.optimizer import OptimizerConfig, make_optimizer
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.run_config import RunConfig
from jaxdistill.step import initial_state
from jaxdistill.students import load_decoder


def main(run: str, out: str) -> None:
    config = load(Path("configs/quickstart.yaml"), [f"run.dir={run}"], RunConfig)
    Path(run).mkdir()
    (Path(run) / "config.yaml").write_text(dump(config))
    mesh = make_mesh(MeshConfig())
    decoder = load_decoder(config.student.path, mesh=mesh)
    state, _ = initial_state(decoder, make_optimizer(OptimizerConfig(), 1), mesh)
    checkpoints = Checkpoints(Path(run), CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.close()
    found, save = {}, students.save_decoder

    def spy(decoder, *arguments, **named):
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(decoder))):
            shards = [shard.data.size for shard in leaf.addressable_shards]
            found[jax.tree_util.keystr(path)] = [leaf.ndim, leaf.size, len(shards), max(shards)]
        save(decoder, *arguments, **named)

    students.save_decoder = spy  # the command imports it when it is called
    export.export(Path(run), None, Path(out))
    Path(f"{out}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
