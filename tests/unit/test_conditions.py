"""The conditions tests run under (tests/conftest.py): what CI refuses to skip, and what is switched on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

FILES = {
    "test_single.py": """
import pytest

def test_runs():
    pass

def test_skips():
    pytest.skip("just so")

@pytest.mark.genuine
def test_lacks_material():
    pytest.skip("not fetched")

def test_model(smollm2):
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_known_to_fail():
    assert False
""",
    "test_whole_file.py": "import pytest\npytest.skip('not here', allow_module_level=True)\n",
}


NO_SKIPS = {"JAXDISTILL_NO_SKIPS": "1"}


@pytest.mark.parametrize(
    ("variables", "files", "outcome"),
    [
        ({}, ["test_single.py", "test_whole_file.py"], "1 passed, 4 skipped, 1 xfailed"),
        (NO_SKIPS, ["test_single.py"], "2 failed, 1 passed, 1 xfailed, 1 error"),
        (NO_SKIPS, ["test_whole_file.py"], "1 error"),
    ],
)
def test_skips_that_are_refused(
    tmp_path: Path, variables: dict[str, str], files: list[str], outcome: str
) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    genuine: x\n")
    for name in files:
        (tmp_path / name).write_text(FILES[name])
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAXDISTILL_", "PYTEST_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "."],
        cwd=tmp_path,
        env={**clean, "JAXDISTILL_CACHE": str(tmp_path / "empty"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1].startswith(outcome + " in "), done.stdout
    assert done.returncode == (0 if not variables else 2 if files == ["test_whole_file.py"] else 1)


def test_annotations_are_checked() -> None:
    import numpy as np
    from jaxtyping import TypeCheckError

    from jaxdistill.records import TokenSpans

    with pytest.raises(TypeCheckError):
        TokenSpans(
            ids=np.zeros(3, np.int64),  # pyright: ignore
            data=b"",
            ends=np.zeros(3, np.int64),
            roles=np.zeros(3, np.int8),
        )


def test_rank_promotion_is_refused() -> None:
    import jax.numpy as jnp

    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)
