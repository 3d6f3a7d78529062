"""Reads what a tokenizer folder holds; nothing here interprets it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxdistill.errors import ConfigError
from jaxdistill.model_folders import model_folder


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files of one folder. Absent optional files are empty mappings.

    `templates` are the chat templates by name; the usual one is called "default". `where` and
    `template_where` name the folder, and where the templates are from, in messages.
    """

    where: str
    source: str  # text of tokenizer.json
    document: Mapping[str, Any]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    templates: Mapping[str, str]
    template_where: str


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not readable as UTF-8 ({error}); fetch the file again") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. A file of its own wins over the one inside tokenizer_config.json."""
    found: dict[str, str] = {}
    entry = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(entry, str):
        found["default"] = entry
    elif isinstance(entry, list):
        found = {str(item["name"]): str(item["template"]) for item in entry}
    elif isinstance(entry, Mapping):
        found = {str(name): str(template) for name, template in entry.items()}
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = _read_text(file)
    return found


def read_files(path: str, chat_template: str | Path | None = None) -> TokenizerFiles:
    """Reads the tokenizer of a folder or hub id. The file `chat_template` stands in for its chat templates.

    Raises ConfigError when the folder, its tokenizer.json, or valid JSON is missing, or it cannot be read.
    """
    try:
        files = _read(model_folder(path, weights=False))
    except OSError as error:  # a name longer than the system allows, a file nobody may read
        raise ConfigError(
            f"{path[:100]}{'...' if len(path) > 100 else ''}: cannot be read ({error.strerror}); expected a "
            "readable folder with tokenizer.json, or a hub id"
        ) from error
    if chat_template is None:
        return files
    try:
        text = _read_text(Path(chat_template).expanduser())
        return replace(files, templates={"default": text}, template_where=str(chat_template))
    except OSError as error:
        raise ConfigError(
            f"chat_template={chat_template}: cannot be read ({error.strerror}); name a Jinja file, or leave "
            "it out to take the model's own"
        ) from error


def _read(folder: Path) -> TokenizerFiles:
    main = folder / "tokenizer.json"
    if not main.is_file():
        raise ConfigError(
            f"{folder}: no tokenizer.json; expected the fast format of the `tokenizers` library. Loading the "
            "tokenizer once with transformers and save_pretrained() writes it"
        )
    document = _read_json(main)
    if not isinstance(document.get("model"), dict) or "vocab" not in document["model"]:
        raise ConfigError(f"{main}: no vocabulary inside; expected a file of the `tokenizers` library")
    special_map = _read_json(folder / "special_tokens_map.json")
    config = {**special_map, **_read_json(folder / "tokenizer_config.json")}
    return TokenizerFiles(
        where=str(folder),
        source=_read_text(main),
        document=document,
        config=config,
        generation=_read_json(folder / "generation_config.json"),
        model=_read_json(folder / "config.json"),
        templates=_templates(folder, config),
        template_where=str(folder),
    )


def special_strings(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json (`bos_token` ...), which templates refer to."""
    strings: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            strings[name] = text
    return strings
