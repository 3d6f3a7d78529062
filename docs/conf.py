"""The site: `make docs` builds it from the Markdown of this folder. A warning is an error, so that a link to
nothing, an anchor that is not there, or a page that `NAVIGATION` leaves out fails the build."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx

from jaxdistill.config.describe import meaning

# What stands beside every page, in a newcomer's order. Kept here and not in index.md, so that the Markdown
# holds nothing but Markdown and reads well wherever it is shown.
NAVIGATION: Mapping[str, Sequence[str]] = {
    "The first hour": ["install", "quickstart", "your_own_pair", "concepts"],
    "A run": [
        "recipes",
        "models",
        "commands",
        "rows",
        "sampling",
        "teachers",
        "rewards",
        "evaluation",
        "lora",
        "runs",
        "hosts",
    ],
    "Objectives": [
        "objectives/reverse_kl",
        "objectives/gkd",
        "objectives/minillm",
        "objectives/alm",
        "objectives/uld",
        "objectives/gold",
        "objectives/xtoken",
        "objectives/sft",
        "objectives/end_of_turn",
        "objectives/sum",
    ],
    "Across tokenizers": ["align", "credit", "tokenizers"],
    "What was measured": ["ablation", "genuine_pair", "smollm2", "toy_pair"],
    "When something is wrong": ["troubleshooting"],
    "The code": ["extending", "api", "design/architecture", "design/parity", "LOG"],
}

project = "jaxdistill"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["benchmarks"]

html_theme = "furo"
html_title = "jaxdistill"
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 4  # the anchors that a forge gives its headings, so that a link works in both places

smartquotes = False
default_role = "code"  # docstrings are read where they stand, and there one backtick is code
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_display_short_literal_types = True


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the pages of `NAVIGATION` below index.md, as the menu that stands beside every page."""
    if docname != "index":
        return
    for caption, pages in NAVIGATION.items():
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def link_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Markdown outside of this folder is no page of the site: a link to it gives the file, as one to code
    does."""
    outside = r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+\.md)(?:#[^)]*)?\)"
    source[0] = re.sub(outside, lambda link: _file_or_page(app, docname, link), source[0])


def _file_or_page(app: Sphinx, docname: str, link: re.Match[str]) -> str:
    file = (Path(app.srcdir) / docname).parent / link[2]
    return link[0] if file.resolve().is_relative_to(app.srcdir) else f"{{download}}`{link[1]} <{link[2]}>`"


def is_config(obj: object) -> bool:
    return isinstance(obj, type) and issubclass(obj, BaseModel)


def config_signature(app: Sphinx, what: str, name: str, obj: object, *_: object) -> tuple[str, str] | None:
    """Of a config, no line with all its settings and their types: they are listed below it."""
    return ("(**settings)", "") if is_config(obj) else None


def config_settings(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Each setting of a config with its default, in the words of `--explain`."""
    if not is_config(obj):
        return
    for setting, field in obj.model_fields.items():
        default = "" if field.is_required() else f" (``{field.get_default(call_default_factory=True)!r}``)"
        lines += ["", f"- ``{setting}``{default}: {' '.join(meaning(obj, setting).split())}"]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", config_signature)
    app.connect("autodoc-process-docstring", config_settings)
    app.connect("source-read", add_navigation)
    app.connect("source-read", link_files)
