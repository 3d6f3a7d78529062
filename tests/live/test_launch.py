"""launch/teacher_sglang.sh with a genuine server of its own, which a run's doctor then asks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.sglang_cpu import FLAGS, LAUNCHER, SETTINGS, environment

from .conftest import ROOT

pytestmark = pytest.mark.live


def test_a_doctor_believes_the_teacher_that_the_script_serves(tmp_path: Path) -> None:
    own = environment() / "bin" / "python"
    if not own.is_file():
        pytest.skip(f"no SGLang in {environment()}; make it with: python scripts/sglang_cpu.py install")
    # On a CPU the server needs its launcher in the place of the module; all else is the script's.
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$2" = sglang.launch_server ] && shift 2 && set -- '
        f'"{LAUNCHER}" "$@"\nexec "{own}" "$@"\n'
    )
    python.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    doctor = [sys.executable, "-m", "jaxdistill", "doctor", "--config", "configs/quickstart.yaml"]
    teacher = (
        "teacher=null", "teacher.kind=sglang", f"teacher.endpoint=http://127.0.0.1:{port}",
        "teacher.tokenizer=assets/toy/teacher", "teacher.api_key_env=TEACHER_KEY",
    )  # fmt: skip
    done = subprocess.run(
        ["launch/teacher_sglang.sh", "assets/toy/teacher", *FLAGS, "--", *doctor, *teacher],
        cwd=ROOT,
        env={
            **os.environ,
            **SETTINGS,
            "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE": "16",  # so that the rows here are made in pieces too
            "SGLANG_PYTHON": str(python),
            "GPUS": "",
            "PORT": port,
            "LOG": str(tmp_path / "log"),
            "TEACHER_KEY": "a-key",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"healthy at http://127.0.0.1:{port} after" in done.stderr
    assert "tokenizer is the served model's own" in done.stdout
    assert "nothing stands in the way of a new run" in done.stdout
    log = (tmp_path / "log").read_text()
    assert "chunked_prefill_size=4096" in log and "mem_fraction_static=0.75" in log
