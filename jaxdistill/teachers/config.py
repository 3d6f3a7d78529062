"""How a teacher is configured: one model a kind, joined by `kind` into `TeacherConfig`. Times in seconds."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxdistill.config import StrictConfig
from jaxdistill.errors import ConfigError
from jaxdistill.servers import EndpointSettings, RequestSettings
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


class ServedSettings(TeacherSettings, RequestSettings):
    """A teacher behind HTTP: how it is asked, and what it may read."""

    max_tokens_per_request: int = Field(
        default=8192, ge=1, description="rows are grouped up to this many tokens"
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


class SGLangConfig(ServedSettings, EndpointSettings):
    """`teacher.kind: sglang`: a server that runs already, and its replicas."""

    kind: Literal["sglang"] = "sglang"
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="folder or hub id of the served model's own tokenizer (default: the student's)",
    )


class EmbeddedConfig(ServedSettings):
    """`teacher.kind: embedded`: a model folder this run serves itself, in a child process."""

    kind: Literal["embedded"] = "embedded"
    model: str = Field(min_length=1, description="folder or hub id of the model to serve")
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
