"""Run by test_planner.py in a process of its own: `sampling_memory.py OUT.json`.

What sampling is planned to take of each device for two, eight and nine prompts, on all devices.
"""

import json
import sys
from pathlib import Path

from jaxdistill.memory import sampling_memory
from jaxdistill.parallel import MeshConfig, make_mesh
from jaxdistill.samplers import RolloutConfig
from jaxdistill.students import abstract_decoder, parse_config
from tests.unit.conftest import CONFIG


def main(out: str) -> None:
    mesh = make_mesh(MeshConfig())
    decoder = abstract_decoder(parse_config(CONFIG, where="the test"), mesh=mesh)
    asked = RolloutConfig(samples_per_prompt=4, max_prompt_tokens=16, max_new_tokens=16)
    found = [sampling_memory(decoder, asked, mesh, prompts=prompts) for prompts in (2, 8, 9)]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
