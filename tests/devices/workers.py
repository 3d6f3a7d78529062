"""Processes with as many CPU devices as a test wants: their number is settled when jax starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_worker(module: str, *arguments: object, devices: int) -> str:
    """Run `tests.devices.<module>` on `devices` CPU devices, and give what it wrote to stderr: the compiler's
    complaints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", f"tests.devices.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr
