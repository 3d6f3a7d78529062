"""The site of `make docs`: it is built without a warning, what leads nowhere fails the build, and its pages
ask the network for nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns("__pycache__", ".*", "runs", "site", "tests")


def build(root: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command of `make docs` for the checkout at `root`, into `out`."""
    recipe = re.search(
        r"^\t.*\.venv/bin/python (-m sphinx .*) docs site$", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe is not None, "make docs has another command"
    words = recipe[1].replace("site/.doctrees", str(out / ".doctrees")).split()
    return subprocess.run(
        [sys.executable, *words, *options, str(root / "docs"), str(out)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out


@pytest.mark.browser
@pytest.mark.parametrize("page", ["index", "concepts", "your_own_pair", "api", "search"])
def test_a_page_opens_without_a_network(page, site, browse):
    said, asked = browse(site / f"{page}.html", "--dump-dom")
    assert asked == []
    assert "CONSOLE" not in said, [line for line in said.splitlines() if "CONSOLE" in line]
    assert "Your own pair in ten minutes" in said  # the navigation stands beside every page


@pytest.mark.slow
def test_nothing_on_any_page_is_loaded_from_elsewhere(site):
    loads = re.compile(r"""(?:\bsrc|<link[^>]*\bhref)=["'](https?:)?//|@import|url\(["']?(https?:)?//""")
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 40
    for page in pages:
        assert loads.search(page.read_text()) is None, page


@pytest.mark.slow
def test_what_leads_nowhere_fails_the_build(tmp_path):
    """Each mistake is named; one build finds them all."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=IGNORED)
    docs = tmp_path / "copy" / "docs"
    with (docs / "runs.md").open("a") as page:
        page.write("\n[a](no_such_page.md) [b](hosts.md#no-such-heading)\n")
        page.write("[c](../no_such_file.py) ![d](no_such.svg)\n")
    (docs / "forgotten.md").write_text("# A page that is in no menu\n")
    with (docs / "api.rst").open("a") as page:
        page.write("\n.. autofunction:: jaxdistill.align.no_such_function\n")
    done = build(tmp_path / "copy", tmp_path / "out")
    assert done.returncode != 0
    for word in (
        "no_such_page.md",
        "no-such-heading",
        "no_such_file.py",
        "no_such.svg",
        "forgotten.md",
        "no_such_function",
    ):
        assert word in done.stderr, (word, done.stderr)
