"""launch/slurm.sbatch on a genuine SLURM: two nodes, both of them this machine."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Recorder, environment

pytestmark = pytest.mark.genuine
CONFIG = """
ClusterName=tests
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1
KillWait=10
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:8
NodeName=n2 NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A controller and two nodes with settings of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        text = CONFIG.format(machine=socket.gethostname(), ports=ports, user=getpass.getuser(), folder=folder)
        (folder / "slurm.conf").write_text(text)
        for number in range(8):
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-7]\n")
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir()
        self.variables = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.daemons = [
            self._daemon("slurmctld", "-D"),
            self._daemon("slurmd", "-D", "-N", "n1"),
            self._daemon("slurmd", "-D", "-N", "n2"),
        ]

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ask(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.variables | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def close(self) -> None:
        for daemon in reversed(self.daemons):
            os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if shutil.which("slurmctld") is None:
        pytest.skip("no SLURM here; on Debian: apt-get install slurmctld slurmd slurm-client")
    running = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        until(lambda: running.ask("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == "2")
        yield running
    finally:
        running.close()


@pytest.fixture
def submit(slurm: Slurm, recorder: Recorder, tmp_path: Path) -> Callable[..., str]:
    """Submits the shipped job as it is but for its CPUs and where its output goes; its number."""

    def call(**more: str) -> str:
        options = ("--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={tmp_path}/out")
        words = ("launch/slurm.sbatch", "--config", "configs/quickstart.yaml", "run.steps=5")
        return slurm.ask("sbatch", *options, *words, PYTHON=str(recorder.python), **more).strip()

    return call


def test_75_puts_the_job_back_and_it_goes_on_to_its_end(
    slurm: Slurm, submit: Callable[..., str], recorder: Recorder, understood
) -> None:
    recorder.ends_with("75")
    number = submit(JAX_LOCAL_DEVICE_IDS="0,1")
    until(lambda: slurm.job(number).get("Restarts") == "1")
    until(lambda: slurm.job(number)["JobState"] == "PENDING")
    first = recorder.calls
    recorder.ends_with("0")
    # SLURM itself waits for two minutes, and must wait for two seconds: what it counts the old job's end in.
    time.sleep(2)
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    until(lambda: slurm.job(number)["JobState"] == "COMPLETED")
    assert len(first) == 4 and len(recorder.calls) == 8
    given = (Path("configs/quickstart.yaml"), ["run.steps=5"], [], (None, None, None))
    assert {repr(understood(call.arguments)) for call in recorder.calls} == {repr(given)}
    # What JAX finds the processes by, and that nothing hides a node's GPUs from them.
    places = sorted((call.variables["SLURM_PROCID"], call.variables["SLURM_LOCALID"]) for call in first)
    assert places == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    for call in first:
        assert call.variables["SLURM_NTASKS"] == "4" and call.variables["SLURM_STEP_NODELIST"] == "n[1-2]"
        assert call.variables["JAX_LOCAL_DEVICE_IDS"] == "0,1"
        assert call.variables.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7") == "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(("code", "more"), [("2", {}), ("75", {"MAX_RESTARTS": "0"})])
def test_other_codes_and_too_many_restarts_end_the_job(
    slurm: Slurm, submit: Callable[..., str], recorder: Recorder, code: str, more: dict[str, str]
) -> None:
    recorder.ends_with(code)
    number = submit(**more)
    until(lambda: slurm.job(number).get("JobState") == "FAILED")
    job = slurm.job(number)
    assert (job["ExitCode"], job["Restarts"], job["Requeue"]) == (f"{code}:0", "0", "1")


def test_a_process_that_is_killed_puts_the_job_back(
    slurm: Slurm, submit: Callable[..., str], recorder: Recorder
) -> None:
    recorder.ends_with("killed")
    number = submit()
    until(lambda: slurm.job(number).get("Restarts") == "1")
    slurm.ask("scancel", number)


@pytest.mark.parametrize(
    ("command", "restarts"),
    [
        (("scancel", "--signal=TERM"), "1"),  # what --signal does: all processes hear it, and not the script
        (("scancel",), "0"),
    ],
)
def test_a_signal_puts_the_job_back_and_one_that_is_cancelled_stays_away(
    slurm: Slurm, submit: Callable[..., str], recorder: Recorder, command: tuple[str, ...], restarts: str
) -> None:
    recorder.ends_with("wait")
    number = submit()
    until(lambda: len(list(recorder.folder.glob("waiting*"))) == 4)
    slurm.ask(*command, number)
    until(lambda: not slurm.ask("squeue", "--noheader", "--states=RUNNING,COMPLETING"))
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ({"1": "PENDING", "0": "CANCELLED"}[restarts], restarts)
    slurm.ask("scancel", number)
