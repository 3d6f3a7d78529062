"""A teacher behind an SGLang server (or anything that speaks its `/generate`).

Letters: S teacher response tokens.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.errors import ConfigError, TeacherContractError
from jaxdistill.records import Rollout, TeacherScores
from jaxdistill.teachers.base import teacher_views
from jaxdistill.teachers.config import EmbeddedConfig, SGLangConfig
from jaxdistill.teachers.checks import ScoringRow, check_row, group_rows, read_scores, scoring_request
from jaxdistill.teachers.transport import Policy, Transport
from jaxdistill.text import Tokenizer

INFO_PATHS = ("/model_info", "/get_model_info")  # newer and older servers


class SGLangTeacher:
    """Scores rollouts over HTTP; requests run concurrently inside `score`."""

    def __init__(
        self,
        config: TeacherConfig,
        *,
        tokenizer: Tokenizer | None = None,
        endpoints: Sequence[str] | None = None,
        gone: Callable[[], bool] = lambda: False,
    ):
        """Reads the API key and the tokenizer; no request is made yet (see `check`).

        `endpoints` replaces the config's, `gone` ends retries early when it returns true: both for a
        server this process started itself. Raises `ConfigError` where the key's variable is not set.
        """
        self.name = config.name
        self.config = config
        key, hint = _api_key(config.api_key_env)
        self.tokenizer = config.load_tokenizer() if tokenizer is None else tokenizer
        self._transport = Transport(
            config.endpoints if endpoints is None else endpoints,
            Policy(
                config.max_concurrency,
                config.request_timeout_s,
                config.attempts,
                config.backoff_s,
                config.backoff_max_s,
            ),
            api_key=key,
            key_hint=hint,
            gone=gone,
        )

    def check(self) -> dict[str, Any]:
        """Ask the server what it serves: reachability, address and key are settled before any work.

        Returns its model info. Raises `TeacherUnavailable` or `TeacherContractError`.
        """
        refused: TeacherContractError | None = None
        for path in INFO_PATHS:
            try:
                info = self._transport.get(path)
            except TeacherContractError as error:
                refused = refused or error
                continue
            if not isinstance(info, dict):
                raise TeacherContractError(
                    f"teacher at {', '.join(self._transport.endpoints)}: {path} answered {info!r:.80}, "
                    "expected an object; check that the address is an SGLang server's"
                )
            return info
        assert refused is not None, "at least one path was asked"
        raise refused

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """log p of each response token by the teacher, at temperature 1, in the order given.

        A rollout whose response is empty to the teacher is not sent and has no scores. Raises
        `TeacherUnavailable` or `TeacherContractError`; then no score of the batch is returned.
        """
        views = teacher_views(self.tokenizer, rollouts, self.config.template_kwargs)
        rows = [
            ScoringRow(number, prompt, response.ids)
            for number, (prompt, response) in enumerate(views)
            if len(response)
        ]
        for row in rows:
            check_row(row, self.tokenizer.vocab_size)
        groups = group_rows(rows, self.config.max_tokens_per_request)
        replies = self._transport.post_all("/generate", [scoring_request(group) for group in groups])
        logprobs = [np.zeros(0, np.float32) for _ in rollouts]
        versions: dict[str, int] = {}  # weight version -> first row that reports it
        for reply, group in zip(replies, groups, strict=True):
            for row, (values, version) in zip(group, read_scores(reply, group), strict=True):
                logprobs[row.number] = values
                versions.setdefault(version, row.number)
        version = _one_version(versions)
        return [
            TeacherScores(response=response, logprobs=values, teacher=self.name, weight_version=version)
            for (_, response), values in zip(views, logprobs, strict=True)
        ]

    def close(self) -> None:
        """Close the connections; calling it again does nothing."""
        self._transport.close()


def _one_version(versions: dict[str, int]) -> str:
    """The weight version of a batch; two of them mean that the teacher changed while it was asked."""
    if len(versions) > 1:
        (first, row), (second, other) = list(versions.items())[:2]
        raise TeacherContractError(
            f"row {other}: got weight_version {second!r}, expected {first!r} as for row {row}; the served "
            "model was changed during the batch, do not update a teacher while a run uses it"
        )
    return next(iter(versions), "")


def _api_key(name: str | None) -> tuple[str | None, str]:
    """The key in environment variable `name`, and where it came from for messages."""
    if name is None:
        return None, ""
    key = os.environ.get(name)
    if not key:
        raise ConfigError(
            f"teacher.api_key_env names the environment variable {name}, which is not set; "
            "export the teacher's API key in it"
        )
    return key, f"check the API key in the environment variable {name}"
