"""A YAML file and dotted overrides, read into a typed model; every mistake is one clear ConfigError."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from jaxdistill.config.explain import Origins, explain
from jaxdistill.config.model_keys import nearest
from jaxdistill.config.overrides import apply, parse_override
from jaxdistill.config.yaml_text import parse, show
from jaxdistill.errors import ConfigError


def load[ModelT: BaseModel](path: Path, overrides: Sequence[str], model: type[ModelT]) -> ModelT:
    """Reads the YAML file at `path`, sets the `a.b=c` overrides on it in order, and checks it all.

    A value may refer to another as `${run.dir}`; `\\${` is a literal `${`. Types are strict as in JSON:
    `"3"` is not a number, `3` is a valid float, a list fills a tuple and text a Path.

    Raises ConfigError, with the file, line or override, the key, what was got and what was expected,
    for a missing or unreadable file, broken YAML, a repeated or unknown key (with the nearest known
    one), a malformed override, a wrong type, or a reference to nothing.
    """
    data, origins = read(path, overrides)
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, data, model, origins)) from None


def read(path: Path, overrides: Sequence[str]) -> tuple[Any, Origins]:
    """The data that `load` checks, references resolved, and where each of its keys came from. Raises
    `ConfigError` as `load` does for what is wrong before any model is known."""
    source = str(path)
    parsed = [parse_override(text) for text in overrides]
    document = parse(_text(path), source)
    if not isinstance(document.value, dict | None):
        raise ConfigError(f"{source}: holds {show(document.value)}, expected a mapping of keys to values")
    origins = Origins(source, document.lines, parsed)
    return _resolve(apply(document, parsed, source), source), origins


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file{_similar(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file{_similar(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}), expected a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _similar(path: Path) -> str:
    """The nearest YAML file of the same folder, or of the folder `path` itself is."""
    folder = path if os.path.isdir(path) else path.parent
    if not os.path.isdir(folder):
        return f" (there is no folder {folder})"
    try:
        names = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:  # a folder that cannot be listed: no hint, and the first message stands
        return ""
    close = nearest(path.name, names)
    if close is not None:
        return f" (did you mean {folder / close}?)"
    return f" ({folder} holds {', '.join(names)})" if 0 < len(names) <= 8 else ""


def _resolve(data: Any, source: str) -> Any:
    """Replaces `${a.b}` by the value of that key."""
    try:
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{source}: '{error.full_key}' is ???, which stands for a value that must be given; "
            f"write it in the file or give {error.full_key}=... as an override"
        ) from None
    except OmegaConfBaseException as error:
        key = f"'{error.full_key}': " if getattr(error, "full_key", None) else ""
        problem = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(
            f"{source}: {key}{problem} "
            "(${a.b} takes the value of another key; write \\${ for the text itself)"
        ) from None
