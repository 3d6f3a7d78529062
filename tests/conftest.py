"""How every test runs: on the CPU, offline, with array annotations checked and no silent broadcasting.

Only environment variables are set here, before anything imports jax: tests of the host rooms must not
pay for loading it.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# A machine's own JAX_PLATFORMS must not move the tests to another device; JAXDISTILL_TEST_PLATFORMS may.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXDISTILL_TEST_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# The tests' programs are small and run a few times: what LLVM would spend on making them fast is most of the
# time. Their operations, and how these are split over devices, are settled before it, as users have them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Many tests, and the runs they start, compile the same programs: the first to do so writes them where all
# workers of this call find them. Nothing outlives the call.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxdistill-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

install_import_hook("jaxdistill", "beartype.beartype")

# How long an example takes says nothing on a machine that does other work beside it. In CI the examples are
# the same each time, so that a change is judged by what it changed; everywhere else they are new ones.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("in CI", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("in CI" if os.environ.get("CI") else "here")

CACHE = Path(os.environ.get("JAXDISTILL_CACHE", "~/.cache/jaxdistill")).expanduser()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, which `scripts/fetch_smollm2.py` makes; skips where it is not."""
    folder = CACHE / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model in {folder}; make it with: .venv/bin/python scripts/fetch_smollm2.py")
    return folder


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For what compiles ahead of time: jax describes a program's arguments in a batch of its own making,
    which holds no arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for fetched material is a genuine one, whether its author marked it or not."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.genuine)


def _refuse(report: Any) -> Any:
    """Turns a skip into a failure where CI asked for that: a check that did not run has not passed."""
    asked = os.environ.get("JAXDISTILL_NO_SKIPS") == "1"
    if asked and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, while JAXDISTILL_NO_SKIPS=1: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Any:
    """Skips of single tests, from a mark, a fixture or the test itself."""
    return _refuse((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Any:
    """Skips of a whole file, which would otherwise take its tests away unseen."""
    return _refuse((yield))
