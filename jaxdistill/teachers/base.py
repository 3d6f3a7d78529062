"""What every teacher has in common: its configuration, its interface, and its view of a rollout.

Letters: P teacher prompt tokens, S teacher response tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Int32
from pydantic import Field, field_validator, model_validator

from jaxdistill.config import StrictConfig
from jaxdistill.records import CONTENT, ROLE_NAMES, Rollout, TeacherScores, TokenSpans
from jaxdistill.text import Tokenizer, concatenate


class TeacherConfig(StrictConfig):
    """Where a teacher is and how it is asked. Times in seconds.

    `sglang` needs `endpoint` (a URL, or a list of URLs of replicas) and `tokenizer`; `embedded` needs
    `model`, a folder it serves itself. `api_key_env` is the NAME of an environment variable.
    """

    kind: Literal["sglang", "embedded"]
    name: str = Field(
        default="teacher", min_length=1, description="what metrics and messages call this teacher"
    )
    endpoint: str | tuple[str, ...] = Field((), description="URL of the server, or a list of replicas")
    tokenizer: str | None = Field(default=None, description="folder or hub id; embedded: defaults to `model`")
    model: str | None = Field(default=None, description="embedded: the model folder to serve")
    roles: dict[str, str] = Field(default_factory=dict, description="role -> token, where not derivable")
    api_key_env: str | None = Field(
        default=None, description="name of the environment variable with the API key"
    )
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to the chat template")
    max_concurrency: int = Field(default=8, ge=1, description="requests in flight at once")
    max_tokens_per_request: int = Field(
        default=8192, ge=1, description="rows are grouped up to this many tokens"
    )
    request_timeout_s: float = Field(
        default=120.0, gt=0, description="deadline of one request, its reply included"
    )
    attempts: int = Field(
        default=5, ge=1, description="tries of one request before the teacher counts as gone"
    )
    backoff_s: float = Field(
        default=0.5, ge=0, description="longest wait after the first failure; doubles each time"
    )
    backoff_max_s: float = Field(default=20.0, ge=0, description="no wait between tries is longer than this")
    start_timeout_s: float = Field(default=180.0, gt=0, description="embedded: time to load and listen")

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoint or endpoints, as a list without trailing slashes."""
        listed = (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint
        return tuple(url.rstrip("/") for url in listed)

    def load_tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer. Raises `ConfigError` where it cannot be loaded."""
        path = self.tokenizer or self.model
        assert path is not None, "checked at validation"
        return Tokenizer.load(path, roles=self.roles or None)

    @field_validator("endpoint")
    @classmethod
    def _urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for url in (value,) if isinstance(value, str) else value:
            _check_url(url)
        return value

    @model_validator(mode="after")
    def _complete(self) -> "TeacherConfig":
        if self.kind == "sglang":
            if not self.endpoint:
                raise ValueError("kind sglang needs endpoint: the URL of the server, or a list of them")
            if not self.tokenizer:
                raise ValueError(
                    "kind sglang needs tokenizer: the folder or hub id of the served model's own"
                )
            if self.model:
                raise ValueError("model is for kind embedded; an sglang server has loaded its own")
        else:
            if not self.model:
                raise ValueError("kind embedded needs model: the folder of the model to serve")
            if self.endpoint:
                raise ValueError("endpoint is for kind sglang; kind embedded starts its own server")
            if self.api_key_env:
                raise ValueError("api_key_env is for kind sglang; kind embedded starts its own server")
        return self


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL such as http://host:30000 is expected")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds credentials; put the key in a variable and name it in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("the URL has a query or fragment; only scheme, host, port and path are expected")


@runtime_checkable
class Teacher(Protocol):
    """Scores rollouts with its own tokenizer. Built by `jaxdistill.teachers.build`, closed by its user."""

    name: str
    tokenizer: Tokenizer

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """The teacher's log-probabilities of each response, in the order given.

        Raises `TeacherUnavailable` (worth trying later) or `TeacherContractError` (a reply that must
        not be believed, or a request refused for good)."""
        ...

    def close(self) -> None:
        """Let go of connections and processes; calling it again does nothing."""
        ...


def teacher_view(
    tokenizer: Tokenizer, rollout: Rollout, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[Int32[np.ndarray, " P"], TokenSpans]:
    """The rollout as the teacher reads it: prompt ids by the teacher's template, and the response.

    The response's bytes are encoded as plain content, apart from the prompt (generation conditions on
    that split too). A role token of the student becomes the teacher's token of the same role, and is
    left out where the teacher has none; a response without an end gets none. A teacher with the
    student's own vocabulary reads the sampled ids as they are: another cut of the same text would be
    another sample.
    """
    return teacher_views(tokenizer, [rollout], template_kwargs)[0]


def teacher_views(
    tokenizer: Tokenizer, rollouts: Sequence[Rollout], template_kwargs: Mapping[str, Any] | None = None
) -> list[tuple[Int32[np.ndarray, " _"], TokenSpans]]:
    """`teacher_view` of each rollout: all contents are encoded in one call, a prompt that several
    rollouts share is rendered once."""
    split = [_parts(rollout, tokenizer) for rollout in rollouts]
    contents = [part for parts in split for part in parts if isinstance(part, bytes)]
    encoded = iter(tokenizer.encode_batch(contents))
    prompts: dict[int, Int32[np.ndarray, " _"]] = {}
    views: list[tuple[Int32[np.ndarray, " _"], TokenSpans]] = []
    for rollout, parts in zip(rollouts, split, strict=True):
        key = id(rollout.prompt)
        if key not in prompts:
            prompt = rollout.prompt
            prompts[key] = tokenizer.render(
                prompt.messages, tools=prompt.tools, template_kwargs=template_kwargs
            )
        spans = [
            next(encoded)
            if isinstance(part, bytes)
            else tokenizer.role_span(part)
            if isinstance(part, str)
            else part
            for part in parts
        ]
        # A response taken over whole stays the same object: the aligner knows the identity by it.
        views.append((prompts[key], spans[0] if len(spans) == 1 else concatenate(spans)))
    return views


def _parts(rollout: Rollout, tokenizer: Tokenizer) -> list[bytes | str | TokenSpans]:
    """The response in order: stretches of content as bytes, role tokens as the role's name; or all of
    it as sampled, where both sides have one vocabulary."""
    response = rollout.response
    # Models of one tokenizer pad it differently: an id from the student's padding may not exist there.
    fits = not len(response) or int(response.ids.max()) < tokenizer.vocab_size
    if fits and rollout.vocabulary == tokenizer.vocab_fingerprint:
        return [response]
    parts: list[bytes | str | TokenSpans] = []
    begin = 0  # byte where the content not yet taken starts
    for index in np.flatnonzero(response.roles != CONTENT):
        # The stretch ends here even at a token the teacher has no counterpart for: one teacher token
        # across that place would stand for bytes on both sides of it and could not be aligned.
        end = int(response.ends[index])
        if end > begin:
            parts.append(response.data[begin:end])
        begin = end
        role = ROLE_NAMES.get(int(response.roles[index]))
        if role is not None and role in tokenizer.roles:
            parts.append(role)
    if len(response.data) > begin:
        parts.append(response.data[begin:])
    return parts
