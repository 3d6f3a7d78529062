"""launch/skypilot.yaml, read by SkyPilot itself: its schema of tasks, and no cloud."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CACHE
from tests.launch.conftest import ROOT

pytestmark = pytest.mark.genuine
# SkyPilot refuses what its schema does not know; but for `job_recovery`, where it lets plugins add keys.
READER = """
import json, sys
import sky
from sky.utils import schemas
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
options = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"]
(known,) = [option["properties"] for option in options if "properties" in option]
refused = []
for wrong in sys.argv[2:]:
    try:
        sky.Task.from_yaml(wrong)
    except Exception as error:
        refused.append(str(error))
print(json.dumps([task.num_nodes, resources.job_recovery, task.volumes, sorted(known), refused]))
"""


def test_skypilot_reads_the_task_and_refuses_keys_it_does_not_know(tmp_path: Path) -> None:
    python = CACHE / "skypilot-0.14.1" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no SkyPilot in {python.parent}; make it with: bash scripts/fetch_skypilot.sh")
    task = ROOT / "launch" / "skypilot.yaml"
    wrong = []
    for number, (key, mistaken) in enumerate((("num_nodes", "nodes"), ("accelerators", "acelerators"))):
        wrong.append(tmp_path / f"{number}.yaml")
        wrong[-1].write_text(task.read_text().replace(f"{key}:", f"{mistaken}:"))
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    quiet = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "TEACHER_KEY": "k"}
    done = subprocess.run(
        [python, "-c", READER, task, *wrong],
        env=kept | quiet,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    nodes, recovery, volumes, known, refused = json.loads(done.stdout.splitlines()[-1])
    assert nodes == 2 and volumes == {"/shared": "jaxdistill"}
    assert recovery["recover_on_exit_codes"] == [75] and set(recovery) <= set(known)
    assert ["num_nodes" in refused[0], "accelerators" in refused[1]] == [True, True]
