"""Where a model is: a folder, or a model of the Hugging Face hub, which is fetched into the hub's own cache.

A name is one text everywhere, in a config and on command lines: `models/Qwen3-1.7B`, `Qwen/Qwen3-1.7B`, or
with a branch, tag or commit `Qwen/Qwen3-1.7B@main`. What lies here as a folder is never looked for elsewhere.
"""

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from jaxdistill import logs
from jaxdistill.errors import ConfigError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w./-]+))?")
_LONGEST = 200  # more than the hub's names have
# What is fetched: no code, no pickle, and nothing of subfolders, where other formats of the same weights lie.
_TOKENIZER = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def model_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of the model `name`: itself, or where the hub's cache keeps what was fetched of it, with its
    weights or without. The processes of a host share that cache, and each file is fetched once.

    Raises `ConfigError` where it is neither, and where the hub does not give it: who was asked, whether the
    cache has it, and what to do.
    """
    if _is_here(name):
        return Path(os.path.expanduser(name))
    found = _HUB_ID.fullmatch(name)
    if found is None or len(name) > _LONGEST:
        raise ConfigError(
            f"no model at {name[:_LONGEST]} (no such folder): expected a folder with config.json, "
            "model*.safetensors and tokenizer.json, or a hub id such as Qwen/Qwen3-1.7B or "
            "Qwen/Qwen3-1.7B@REVISION; check the path"
        )
    return _fetched(name, *found.groups(), (*_TOKENIZER, *_WEIGHTS) if weights else _TOKENIZER)


def hub_commit(name: str) -> str | None:
    """The commit of the hub that the fetched model `name` is of; None for a folder of one's own."""
    return None if _is_here(name) else model_folder(name).name


def hub_name(name: str) -> tuple[str, str | None] | None:
    """Of a model of the hub its id, as other libraries know it, and its revision; None for a folder."""
    if _is_here(name):
        return None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def without_revision(name: str) -> str:
    """The name as other libraries know the model: of a hub id its id alone."""
    found = hub_name(name)
    return name if found is None else found[0]


def _is_here(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))  # unlike the methods of a path, these never raise


@cache  # a process asks once: a branch that moves meanwhile would give it two models
def _fetched(name: str, repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Imported here: it is needed for hub ids alone, and slow to load.
    try:
        from huggingface_hub import HfApi, constants, get_token, snapshot_download
    except ValueError as error:  # it reads its timeouts when it is loaded
        raise ConfigError(f"{name}: one of the variables HF_HUB_*_TIMEOUT is no number ({error})") from error
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    if logs.quiet() or logs.as_json():
        disable_progress_bars()
    place = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if not (own := get_token() or "").isascii():
        raise ConfigError(f"{name}: the token of HF_TOKEN has letters that no request can carry; check it")
    token = "the token of HF_TOKEN was sent" if own else "no token was sent: HF_TOKEN is not set"
    # Of the HTTP library that the client has, httpx or httpx2.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    silent: Exception | None = None
    refused: Exception | None = None
    try:  # the client's own first question waits for ever
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError) as error:
        refused = error  # an answer, which comes again below, unless the cache has all of it
    except http_error as error:
        silent = error
    # No message of the hub's is repeated: it may say what it was sent.
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=silent is not None,
        )
        if (why_not := silent or refused) is not None:
            logger.warning(
                "%s: the hub at %s did not give it (%s); what the cache has is used, commit %s",
                name,
                place,
                type(why_not).__name__,
                Path(found).name,
            )
        return Path(found)
    except GatedRepoError as error:
        why = (
            f"its terms must be accepted first ({token}); accept them on its page there, and set HF_TOKEN to "
            "a token of that account"
        )
        cause: Exception = error
    except RepositoryNotFoundError as error:
        why = f"no such model, or a private one ({token}); check the name, and HF_TOKEN for a private one"
        cause = error
    except RevisionNotFoundError as error:
        why, cause = f"it has no revision {revision!r}; name a branch, a tag or a commit", error
    except LocalEntryNotFoundError as error:
        kept = f"the cache {constants.HF_HUB_CACHE} has not all of it"
        if constants.HF_HUB_OFFLINE:
            why = f"HF_HUB_OFFLINE is set, and {kept}; unset it, or name a folder"
        else:
            asked = type(silent or error.__cause__ or error).__name__
            why = f"no answer ({asked}), and {kept}; check the network and HF_ENDPOINT, or name a folder"
        cause = error
    except HFValidationError as error:
        why, cause = "that is no hub id, which looks like Qwen/Qwen3-1.7B; check the path", error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "check HF_TOKEN" if status in (401, 403) else "try again later, or name a folder"
        why, cause = f"status {status} ({token}); {remedy}", error
    except http_error as error:
        asked = type(error).__name__
        why, cause = f"no answer ({asked}); check the network and HF_ENDPOINT, or name a folder", error
    except OSError as error:
        said = error.strerror or type(error).__name__
        why, cause = f"{said}; make room where HF_HOME is, or name a folder", error
    raise ConfigError(
        f"{name}: no such folder here, and not fetched from the hub at {place}: {why}"
    ) from cause
