"""A model folder -> the engine and what the server shows of it."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RawTokenizer

from jaxdistill.errors import ConfigError
from jaxdistill.serving.app import Served
from jaxdistill.serving.engine import DecoderEngine
from jaxdistill.students import load_decoder
from jaxdistill.text import Tokenizer


def load_engine(
    folder: Path,
    *,
    max_batch_tokens: int,
    context_length: int | None,
    roles: Mapping[str, str] | None = None,
) -> tuple[DecoderEngine, Served]:
    """Load weights and, where the folder has one, the tokenizer (for the text of generated tokens and
    the tokens that end a turn). Raises `ConfigError` for a folder that cannot be served."""
    decoder = load_decoder(folder)
    config = _read_json(folder / "config.json")
    tokenizer = Tokenizer.load(str(folder), roles=roles) if (folder / "tokenizer.json").is_file() else None
    stop_ids = tokenizer.stop_ids if tokenizer else _configured_ends(folder, config)

    def text(ids: np.ndarray) -> str:
        return tokenizer.spans(ids).text if tokenizer else ""

    engine = DecoderEngine(
        decoder,
        frozenset(i for i in stop_ids if i < decoder.config.vocab_size),
        max_batch_tokens=max_batch_tokens,
        context_length=context_length,
    )

    @cache
    def token_texts() -> list[str]:
        # As the genuine server decodes a token alone: special tokens by their names, and a part of a
        # character as U+FFFD.
        raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
        ids = range(decoder.config.vocab_size)
        return raw.decode_batch([[i] for i in ids], skip_special_tokens=False)

    return engine, Served(
        path=str(folder), config=config, text=text, token_texts=token_texts if tokenizer else None
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error}); download or export the model again") from error


def _configured_ends(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, or else of config.json: one id or several."""
    generation = folder / "generation_config.json"
    settings = _read_json(generation) if generation.is_file() else {}
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, Iterable) else [ends])
