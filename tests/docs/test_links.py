"""Links within the repository lead somewhere, from every Markdown file, and to every anchor. `make docs`
checks those of the site, which the pages outside of docs/ are no part of."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *sorted(ROOT.glob("*.md")),
    *(ROOT / "benchmarks").glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.M | re.S)


def links(text: str) -> list[str]:
    """The targets of all links and images; what stands in code is none."""
    return _LINK.findall(_CODE.sub("`code`", text))


def anchors(text: str) -> set[str]:
    """The anchors a forge gives a page's headings."""
    found: set[str] = set()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text()
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme in ("https", "http") and "." in parts.netloc, f"{path}: no address: {link}"
            continue
        assert not parts.netloc and not parts.path.startswith("/"), f"{path}: {link} is not relative"
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        assert target.is_relative_to(ROOT) and target.exists(), f"{path}: {link} leads nowhere"
        if parts.fragment and target.suffix == ".md":
            assert parts.fragment in anchors(target.read_text()), f"{path}: {link} has no such heading"


def test_links_are_found_where_they_are():
    text = "[a](b.md) ![c [d]](e.svg#f) `[g](h)` [i](j(k).md)\n```\n[l](m)\n```\n"
    assert links(text) == ["b.md", "e.svg#f", "j(k).md"]


def test_headings_become_the_anchors_of_a_forge():
    text = "# On SGLang servers\n## `is not` of the form a.b=c\n## Same\n## Same\n```\n# no heading\n```\n"
    assert anchors(text) == {"on-sglang-servers", "is-not-of-the-form-abc", "same", "same-1"}
