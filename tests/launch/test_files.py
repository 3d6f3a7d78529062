"""What launch/ gives to Kubernetes and SkyPilot.

Checked: the JobSet against the types of its API, down to the pods (names and types of all fields; the
Kubeflow project makes them from the API's own description), what is said twice in it, and that our command
line understands the commands. Not checked, for want of a cluster: values that only a controller judges, and
what JobSet and SkyPilot do with them. `test_skypilot` has SkyPilot's own reader of tasks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from tests.launch.conftest import ROOT, Recorder, environment

FILES = sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file())
JOBSET = ROOT / "launch" / "k8s" / "jobset.yaml"
TASK = ROOT / "launch" / "skypilot.yaml"


def parsed(document: Any) -> Any:
    """The document as JobSet's types give it back: what they do not know is missing."""
    found = JobsetV1alpha2JobSet.from_dict(document)
    assert found is not None
    return found.to_dict()


@pytest.fixture
def jobset() -> Any:
    return yaml.safe_load(JOBSET.read_text())


def test_the_jobset_has_the_fields_of_its_api(jobset: Any) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert parsed(jobset) == jobset


def test_fields_that_the_api_does_not_have_are_noticed(jobset: Any) -> None:
    train = jobset["spec"]["replicatedJobs"][1]
    pod = train["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["volumesMounts"] = pod["containers"][0].pop("volumeMounts")
    assert parsed(jobset) != jobset
    pod["terminationGracePeriodSeconds"] = "soon"
    with pytest.raises(ValidationError, match="terminationGracePeriodSeconds"):
        parsed(jobset)


def test_what_the_jobset_says_twice_agrees(jobset: Any) -> None:
    spec = jobset["spec"]
    teacher, train = spec["replicatedJobs"]
    job, pod = train["template"]["spec"], train["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    hosts = int(env["JAXDISTILL_PROCESSES"])
    assert hosts == job["completions"] == job["parallelism"] > 1
    network, name = spec["network"]["subdomain"], jobset["metadata"]["name"]
    host, _, port = env["JAXDISTILL_COORDINATOR"].partition(":")
    assert host == f"{name}-{train['name']}-0-0.{network}" and port.isdigit()
    assert f"http://{name}-{teacher['name']}-0-0.{network}:30000" in JOBSET.read_text()
    assert spec["successPolicy"]["targetReplicatedJobs"] == [train["name"]]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert 75 not in rule["onExitCodes"]["values"]
    for one in (teacher, train):
        shown = one["template"]["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in shown["volumes"]}
        assert {mount["name"] for mount in shown["containers"][0]["volumeMounts"]} == volumes
    # The teacher is started as the script for one machine does.
    script = (ROOT / "launch" / "teacher_sglang.sh").read_text()
    for flag in teacher["template"]["spec"]["template"]["spec"]["containers"][0]["args"]:
        key, _, value = flag.partition("=")
        assert key in script or key == "--api-key"
        if key in ("--chunked-prefill-size", "--mem-fraction-static"):
            assert f"{key} {value}" in script


def test_the_jobset_starts_what_our_command_line_understands(jobset: Any, understood: Any) -> None:
    (container,) = jobset["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"]
    word, *arguments = container["command"]
    assert word == "jaxdistill" and "args" not in container
    assert understood(arguments) == (Path("/shared/run.yaml"), [], [], (None, None, None))


def test_skypilot_runs_what_our_command_line_understands(
    tmp_path: Path, recorder: Recorder, understood: Any
) -> None:
    task = yaml.safe_load(TASK.read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(recorder.python)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    recorder.ends_with("75")
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=environment(**task["envs"], **node),
        timeout=60,
        check=False,
    )
    assert done.returncode == 75
    (call,) = recorder.calls
    config = Path(task["envs"]["CONFIG"])
    assert understood(call.arguments) == (config, [], [], ("10.0.0.1:12345", 2, 1))


def test_the_shell_in_skypilots_file_is_clean() -> None:
    task = yaml.safe_load(TASK.read_text())
    for part in ("setup", "run"):
        done = subprocess.run(
            [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"],
            input=task[part],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_says_how_it_is_run(path: Path) -> None:
    lines = path.read_text().splitlines()
    script = path.suffix in (".sh", ".sbatch")
    assert (lines[0] == "#!/usr/bin/env bash") == script == os.access(path, os.X_OK)
    assert f"launch/{path.relative_to(ROOT / 'launch')}" in "\n".join(lines[:5])
    assert all(line.startswith("#") for line in lines[:5])
    assert path.name in (ROOT / "docs" / "hosts.md").read_text()
