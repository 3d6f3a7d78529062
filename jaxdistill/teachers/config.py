"""How a teacher is configured: one model a kind, joined by `kind` into `TeacherConfig`. Times in seconds."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.text import Tokenizer


class TeacherSettings(StrictConfig):
    """What every kind of teacher has: its name, its tokenizer's settings, its part of the batch, and what
    is asked of it and believed."""

    name: str = Field(
        default="teacher",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="what metrics and messages call this teacher",
    )
    tokenizer: str | None = Field(default=None, description="folder or hub id of the teacher's tokenizer")
    roles: dict[str, str] = Field(default_factory=dict, description="role -> token, where not derivable")
    chat_template: Path | None = Field(
        default=None, description="a Jinja file in place of the tokenizer's own chat template"
    )
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="passed to the chat template")
    sources: tuple[str, ...] = Field(
        default=(), description="several teachers: the prompts' sources this one scores"
    )
    share: float = Field(
        default=1.0,
        gt=0,
        description="several teachers: its part of the prompts that others could score as well",
    )
    weight: float = Field(default=1.0, gt=0, description="weight of its rows in the objective")
    top_k: int = Field(default=0, ge=0, description="most likely tokens asked for at each position; 0: none")
    end_logprobs: bool = Field(
        default=False, description="ask for the end of turn's log-probability at each position too"
    )
    max_unscored: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of a batch's rows that may lack scores before the run stops with a checkpoint",
    )

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub id of the teacher's tokenizer. Raises `ConfigError` where none is named, and no run
        says whose to take."""
        if self.tokenizer is None:
            raise ConfigError(f"teacher {self.name!r} names no tokenizer; set tokenizer= to its model's own")
        return self.tokenizer

    def load_tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer. Raises `ConfigError` where it cannot be loaded."""
        return Tokenizer.load(self.tokenizer_path, roles=self.roles or None, chat_template=self.chat_template)


class ServedSettings(TeacherSettings):
    """A teacher behind HTTP: how patiently and how hard it is asked."""

    max_concurrency: int = Field(default=8, ge=1, description="requests in flight at once, all endpoints")
    max_tokens_per_request: int = Field(
        default=8192, ge=1, description="rows are grouped up to this many tokens"
    )
    request_timeout_s: float = Field(
        default=120.0, gt=0, description="deadline of one request, its reply included"
    )
    batch_budget_s: float = Field(
        default=900.0, gt=0, description="time for a whole batch, retries included; then the teacher is gone"
    )
    start_timeout_s: float = Field(
        default=60.0, gt=0, description="time for the teacher's first answer when a run starts"
    )
    attempts: int = Field(
        default=5, ge=1, description="tries of a request that the server itself answers with status 500"
    )
    backoff_s: float = Field(
        default=0.5, ge=0, description="longest wait after the first failure; doubles each time"
    )
    backoff_max_s: float = Field(
        default=20.0, ge=0, description="longest random wait; Retry-After comes on top"
    )
    breaker_failures: int = Field(
        default=5, ge=1, description="failures in a row after which an endpoint is left alone"
    )
    breaker_probe_s: float = Field(
        default=5.0,
        gt=0,
        description="time between the single requests that find out if it is back; grows while others work",
    )
    hedge_share: float = Field(
        default=0.05, ge=0, lt=1, description="share of requests sent a second time when they lag; 0: never"
    )
    context_length: int | None = Field(
        default=None, ge=2, description="longest row in teacher tokens (default: what the server says)"
    )
    too_long: Literal["mask", "truncate", "stop"] = Field(
        default="mask",
        description="a row beyond the context: no signal, signal on what fits, or the end of the run; a "
        "prompt to be answered that leaves no room: no response (the first two), or the end of the run",
    )
    canary_tolerance: float = Field(
        default=0.1,
        gt=0,
        description="mean difference in nats a token beyond which the served model counts as another one",
    )
    record: Path | None = Field(
        default=None, description="folder for the scores (Parquet), to be replayed without the server"
    )


class SGLangConfig(ServedSettings):
    """`teacher.kind: sglang`: a server that runs already, and its replicas.

    `api_key_env` is the NAME of an environment variable.
    """

    kind: Literal["sglang"] = "sglang"
    endpoint: str | tuple[str, ...] = Field(description="URL of the server, or a list of replicas")
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="folder or hub id of the served model's own tokenizer (default: the student's)",
    )
    api_key_env: str | None = Field(
        default=None, description="name of the environment variable with the API key"
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoint or endpoints, as a list without trailing slashes."""
        listed = (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint
        return tuple(url.rstrip("/") for url in listed)

    @field_validator("api_key_env")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        # What stands here by mistake may be the key itself: it is not repeated.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("the NAME of an environment variable is expected here, not the key")
        return value

    @field_validator("endpoint")
    @classmethod
    def _urls(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        listed = (value,) if isinstance(value, str) else value
        if not listed:
            raise ValueError("the URL of the server, or a list of them, is expected")
        for url in listed:
            _check_url(url)
        if len({url.rstrip("/") for url in listed}) < len(listed):
            raise ValueError("one URL is listed twice")
        return value


class EmbeddedConfig(ServedSettings):
    """`teacher.kind: embedded`: a model folder this run serves itself, in a child process."""

    kind: Literal["embedded"] = "embedded"
    model: str = Field(min_length=1, description="folder of the model to serve")
    tokenizer: str | None = Field(default=None, description="folder or hub id (default: `model`)")
    start_timeout_s: float = Field(default=180.0, gt=0, description="time to load, listen and answer")

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or self.model


class ReplayConfig(TeacherSettings):
    """`teacher.kind: replay`: scores that another run recorded (`record:`); no server is needed."""

    kind: Literal["replay"] = "replay"
    path: Path = Field(description="the folder another run recorded into")
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="folder or hub id of the recorded teacher's tokenizer (default: the student's)",
    )


TeacherConfig = Annotated[SGLangConfig | EmbeddedConfig | ReplayConfig, Field(discriminator="kind")]


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        sound = parts.port != 0 and parts.hostname and not any(sign.isspace() for sign in url)
    except ValueError:  # a port that is no number, or none there can be
        sound = False
    if parts.scheme not in ("http", "https") or not sound:
        raise ValueError("a URL such as http://host:30000 is expected")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds credentials; put the key in a variable and name it in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("the URL has a query or fragment; only scheme, host, port and path are expected")
