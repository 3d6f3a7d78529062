"""Every block of the documentation is run, or says why not; and the comparison that the runs rest on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxdistill.config import load
from jaxdistill.run_config import RunConfig
from tests.docs.blocks import RUN, SHOWN, blocks, fits, line_fits

ROOT = Path(__file__).parents[2]
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_says_what_it_is(page):
    """A fence without a language could hold commands that nobody runs."""
    for block in blocks(ROOT, page):
        assert block.language in RUN + SHOWN, (
            f"{block.where}: begin the fence with one of {RUN} or {SHOWN}, got {block.language!r}"
        )
        assert block.language in RUN or block.not_run is None, f"{block.where}: nothing in it would be run"
        if block.language == "console":
            assert list(block.commands()), f"{block.where}: a console block without a command"


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=block.where)
        for page in PAGES
        for block in blocks(ROOT, page)
        if block.language == "yaml"
    ]


@pytest.mark.parametrize("block", yaml_blocks())
def test_the_settings_of_a_page_are_settings(block, tmp_path):
    """What a page shows of a config, put into the quickstart's, is a config."""
    shown = yaml.safe_load(block.body) or {}
    whole = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    if "teachers" in shown:
        del whole["teacher"]
    for section, settings in shown.items():
        told_apart = section in ("objective", "teacher", "sampler")  # by their kind, which the other has not
        joined = isinstance(settings, dict) and not told_apart
        whole[section] = {**whole.get(section, {}), **settings} if joined else settings
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole, allow_unicode=True))
    load(tmp_path / "config.yaml", [], RunConfig)


def test_the_quickstart_is_shown_as_it_is():
    shown = [b.body for b in blocks(ROOT, Path("docs/quickstart.md")) if b.language == "yaml"]
    assert [yaml.safe_load(body) for body in shown] == [
        yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    ]


def test_a_block_is_read_with_its_rule(tmp_path):
    page = "a\n<!-- not run: needs GPUs -->\n\n```bash\nx\n```\n\n<!-- numbers within 5 % -->\n```console\n"
    (tmp_path / "page.md").write_text(page + "$ first \\\n  more\none\n\n$ second\n```\n")
    first, second = blocks(tmp_path, Path("page.md"))
    assert (first.line, first.not_run, first.tolerance) == (4, "needs GPUs", 0.0)
    assert (second.line, second.not_run, second.tolerance) == (9, None, 0.05)
    assert list(second.commands()) == [("first \\\n  more", ["one", ""]), ("second", [])]


def test_a_comment_that_is_no_rule_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("<!-- not tun: needs GPUs -->\n```bash\nx\n```\n")
    with pytest.raises(ValueError, match=r"page\.md:2: .*not tun"):
        blocks(tmp_path, Path("page.md"))


@pytest.mark.parametrize(
    ("shown", "came", "tolerance", "same"),
    [
        ("saved 3", "saved 3", 0, True),
        ("saved 3", "saved 4", 0, False),
        ("saved ... in 2 s", "saved x y in 2 s", 0, True),
        ("saved ... in 2 s", "saved x y in 3 s", 0, False),
        ("a.b", "axb", 0, False),
        ("loss 0.50", "loss 0.54", 0.1, True),
        ("loss 0.50", "loss 0.56", 0.1, False),
        ("loss 0.50 of 9.5 %", "loss  0.51 of 10.1 %", 0.1, True),
        ("loss 0.50 in ... s", "loss 0.51 in 7 s", 0.1, True),
        ("loss 0.50 now", "loss 0.51 then", 0.1, False),
    ],
)
def test_a_line_is_compared_by_the_rules(shown, came, tolerance, same):
    assert line_fits(shown, came, tolerance) == same


def test_a_line_of_dots_stands_for_any_lines():
    assert fits(["a", "...", "c"], ["a", "b", "b", "c"])
    assert fits(["a", "...", "c"], ["a", "c"])
    assert not fits(["a", "...", "c"], ["a", "b"])
    assert not fits(["a"], ["a", "b"])
    assert not fits([], ["a"])
