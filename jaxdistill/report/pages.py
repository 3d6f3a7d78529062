"""The look that all pages share: one file each, in light and dark, without scripts, that loads nothing."""

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from jaxdistill.errors import ConfigError
from jaxdistill.metrics.rows import write_atomically
from jaxdistill.report.plots import theme_css


def template_text(name: str) -> str:
    """The template of that name as it is shipped."""
    return resources.files("jaxdistill.report").joinpath(name).read_text("utf-8")


def render_page(template: str, **values: Any) -> str:
    """The template of that name filled in, as HTML; every value is escaped that is not `Markup`."""
    environment = Environment(
        loader=FunctionLoader(template_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        light=theme_css("light"), dark=theme_css("dark"), **values
    )


def write_page(path: Path, text: str) -> None:
    """Write a page, or a picture, whole or not at all. Raises `ConfigError` where that is not possible."""
    try:
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from error
