"""The configuration of a whole run: the components' configs joined, and what must hold between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from jaxdistill.checkpoint import CheckpointConfig
from jaxdistill.config import StrictConfig
from jaxdistill.data import DataConfig
from jaxdistill.evaluation import EvalConfig
from jaxdistill.losses import ObjectiveConfig
from jaxdistill.losses.reverse_kl import ReverseKLConfig
from jaxdistill.losses.sum import SumConfig
from jaxdistill.metrics import SERVICES
from jaxdistill.optimizer import OptimizerConfig
from jaxdistill.packing import ShapesConfig
from jaxdistill.parallel import MeshConfig, processes
from jaxdistill.records import ORIGINS, Part
from jaxdistill.rewards import RewardConfig
from jaxdistill.samplers import (
    LocalSamplerConfig,
    OriginsConfig,
    RolloutConfig,
    SamplerConfig,
    Schedule,
    SGLangSamplerConfig,
)
from jaxdistill.students import AttentionChoice, LoraConfig, Remat
from jaxdistill.teachers import EmbeddedConfig, ReplayConfig, ServedSettings, TeacherConfig

# What each optional part of the targets needs of a teacher's settings: the key, a value for it, and in words.
_ASKED: Mapping[Part, tuple[str, str, str]] = {
    "projection": ("top_k", "16", "the teacher's most likely tokens"),
    "shared": ("top_k", "16", "the teacher's most likely tokens"),
    "end": ("end_logprobs", "true", "the log-probability of the end of turn"),
}
_METRIC_GROUPS = frozenset({"eval", "references", "sampler", "seconds"})


class RunSection(StrictConfig):
    """Length (`steps`), place (`dir`) and `seed` of the run. The same seed, data and models give the same
    run. `tensorboard`: metrics are written for it too, into the folder; `wandb` (PROJECT, or ENTITY/PROJECT)
    and `trackio` name the project of such a service that gets them beside.

    `compilation_cache` is a folder for compiled programs, which a later start on the same kind of device with
    the same versions reads in place of compiling; null for jax's own setting (JAX_COMPILATION_CACHE_DIR).

    `max_hours` ends the run then as a signal would: with a checkpoint, exit code 75, to be started again.

    `barrier_timeout_s` is how long processes of one run wait for each other (docs/hosts.md): longer than the
    slowest of them ever needs more than the others, and than any one program needs with its compilation."""

    steps: int = Field(ge=1)
    dir: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    tensorboard: bool = True
    wandb: str | None = Field(default=None, pattern=r"^([^/]+/)?[^/]+$")
    trackio: str | None = Field(default=None, pattern=r"^[^/]+$")
    compilation_cache: Path | None = None
    max_hours: float | None = Field(default=None, gt=0)
    barrier_timeout_s: float = Field(default=600.0, gt=0)

    @property
    def projects(self) -> dict[str, str | None]:
        """The project of each tracking service by the service's name, None where it gets nothing."""
        return {service: getattr(self, service) for service in SERVICES}


class StudentConfig(StrictConfig):
    """The model that learns. `path` is a folder in Hugging Face format, or a hub id such as Qwen/Qwen3-1.7B,
    with a branch, tag or commit as Qwen/Qwen3-1.7B@REVISION (docs/models.md). `roles` overrides which token
    plays which role, e.g. {end_of_turn: "<|im_end|>"}; `chat_template` is a Jinja file in place of the
    folder's own (configs/templates/completion.jinja: plain text, for base models).

    `remat` is what is kept of a layer for the backward pass, and not computed again: `layer` its input alone,
    `dots` the results of its products with weights too, `none` everything; the update is the same.

    `compute_dtype` is what its products run in, `auto` float32 on CPUs and bfloat16 elsewhere; parameters are
    kept in float32, and norms, softmax, logits and sums are computed in it. `attention` is who computes that
    over whole rows: `auto` is cuDNN's on NVIDIA's GPUs if it passes a check at the start, else XLA's
    (`jaxdistill.students.fused_attention`).

    `router_aux_coefficient` is for a student with experts: how much of the loss that keeps them equally busy
    is added to the objective (`router_balance` in the metrics says what it is).

    `lora` trains low-rank adapters alone, beside the weights of `path` (docs/lora.md)."""

    path: str
    roles: dict[str, str] = Field(default_factory=dict)
    chat_template: Path | None = None
    remat: Remat = "layer"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: AttentionChoice = "auto"
    router_aux_coefficient: float = Field(default=0.0, ge=0)
    lora: LoraConfig | None = None


class RunConfig(StrictConfig):
    """One YAML file of `configs/`. Who scores: one `teacher`, or several `teachers`; what is learned from it:
    the `objective`."""

    run: RunSection
    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: tuple[TeacherConfig, ...] = ()
    rollout: RolloutConfig = RolloutConfig()
    sampler: SamplerConfig = LocalSamplerConfig()
    objective: ObjectiveConfig = ReverseKLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    shapes: ShapesConfig = ShapesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    reward: RewardConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        self._check_teachers()
        self._check_rows()
        self.objective.check_sampling(self.rollout.off_policy)
        self._check_reward()
        self._check_sampler()
        return self

    def _check_rows(self) -> None:
        """Their lengths, and who writes them."""
        if self.buckets[-1] < self.rollout.max_prompt_tokens + self.rollout.max_new_tokens:
            raise ValueError(
                f"shapes.buckets={list(self.buckets)} cannot hold a prompt of rollout.max_prompt_tokens="
                f"{self.rollout.max_prompt_tokens} with rollout.max_new_tokens={self.rollout.max_new_tokens}"
                "; the last bucket must be at least their sum"
            )
        if self.origins.most("teacher"):
            if not self.all_teachers:
                raise ValueError(
                    "the teacher is to answer prompts (rollout.origins.teacher, or the objective's seq_kd), "
                    "which needs a teacher: section"
                )
            replayed = [one.name for one in self.all_teachers if isinstance(one, ReplayConfig)]
            if replayed:
                raise ValueError(
                    f"teacher {replayed[0]!r} replays recorded scores and cannot answer prompts; name a live "
                    "teacher, or give rollout.origins.teacher no share"
                )
        self.objective.check_origins(
            {origin: self.origins.most(origin) for origin in ORIGINS},
            given=self.rollout.origins is not None,
        )

    def _check_teachers(self) -> None:
        if self.teacher is not None and self.teachers:
            raise ValueError(
                "teacher: is for one teacher and teachers: for a list of them; give one of the two"
            )
        names = [teacher.name for teacher in self.all_teachers]
        if len(set(names)) < len(names):
            raise ValueError(
                f"teachers are told apart by name in the metrics, got {names}; give each its own name"
            )
        folders = [one.record for one in self.all_teachers if isinstance(one, ServedSettings) and one.record]
        if len(set(folders)) < len(folders):
            raise ValueError("two teachers record into one folder; a folder holds the scores of one teacher")
        terms = [term.label for term in self.objective.terms] if isinstance(self.objective, SumConfig) else []
        for what, labels, groups in (
            ("a teacher", names, _METRIC_GROUPS),
            ("a term of the sum", terms, _METRIC_GROUPS | set(names)),
        ):
            if taken := sorted(set(labels) & groups):
                raise ValueError(f"{what} cannot be called {taken[0]!r}: metrics have a group of that name")
        if self.objective.needs_teacher and not self.all_teachers:
            raise ValueError(
                f"objective.kind={self.objective.kind} needs a teacher: section (objective.kind=sft does not)"
            )

    @model_validator(mode="after")
    def _nothing_left_open(self) -> "RunConfig":
        """What hangs on another section is settled here, so that the run's config.yaml says all of it."""
        teachers = tuple(self._with_tokenizer(one) for one in self.all_teachers)
        objective = self.objective.resolved(
            top_k=bool(teachers) and all(one.top_k for one in teachers),
            stale=self.rollout.max_staleness > 0,
        )
        for part, (key, value, what) in _ASKED.items():
            lacking = [one.name for one in teachers if not getattr(one, key)]
            if part in objective.needs and lacking:
                raise ValueError(
                    f"objective.kind={self.objective.kind} reads {what}, which teacher {lacking[0]!r} is not "
                    f"asked for; set its {key}={value}"
                )
        if objective.signal == "exact" and not objective.reads_chunks:
            raise ValueError(
                "objective.signal=exact keeps one-to-one chunks alone, but objective.kind="
                f"{self.objective.kind} reads no chunks here; {objective.signal_advice}"
            )
        values = {"objective": objective}
        values |= {"teacher": teachers[0]} if self.teacher is not None else {"teachers": teachers}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the models are frozen for everybody else
        return self

    def _with_tokenizer(self, teacher: TeacherConfig) -> TeacherConfig:
        """A teacher that names no tokenizer is taken to have the student's, with its roles. A server that
        shows another one is refused before the first step, one that shows none is warned of."""
        if isinstance(teacher, EmbeddedConfig) or teacher.tokenizer is not None:
            return teacher
        student = {"tokenizer": self.student.path, "roles": teacher.roles or self.student.roles}
        return teacher.model_copy(update=student)

    def _check_sampler(self) -> None:
        """What servers that sample cannot be asked for, or do not say."""
        if not isinstance(self.sampler, SGLangSamplerConfig):
            return
        local = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "kv_dtype": None}
        for name, neutral in local.items():
            if (value := getattr(self.rollout, name)) != neutral:
                raise ValueError(
                    f"rollout.{name}={value} is for sampler.kind=local: a server does not say what its "
                    "filtered distribution gave a token, and keeps its cache as it was started to; leave it "
                    "out"
                )
        if self.rollout.max_staleness and self.rollout.temperature not in (0.0, 1.0):
            raise ValueError(
                f"rollout.temperature={self.rollout.temperature} with rollout.max_staleness="
                f"{self.rollout.max_staleness} is for sampler.kind=local: a server is asked a second time "
                "for what the model itself gave the tokens, and may have other weights by then; set one of "
                "them to its default"
            )

    def _check_reward(self) -> None:
        if self.reward is None and self.objective.reads_reward:
            raise ValueError("objective.reward_coefficient needs a reward: section, which names a scorer")
        if self.reward is None:
            return
        if not self.objective.reads_reward:
            raise ValueError(
                f"a reward: section, but objective.kind={self.objective.kind} does not read it; set "
                "objective.reward_coefficient, of an objective that has it, or leave reward: out"
            )
        if self.reward.normalize == "group" and self.rollout.samples_per_prompt == 1:
            raise ValueError(
                "reward.normalize=group compares the samples of one prompt, and rollout.samples_per_prompt "
                "is 1: every reward would be 0; take more samples, or reward.normalize=none"
            )

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        """The one teacher, or the list of them; empty without any."""
        return self.teachers if self.teacher is None else (self.teacher,)

    @property
    def origins(self) -> OriginsConfig:
        """Who answers the prompts: `rollout.origins`, or else what the objective says."""
        return self.rollout.origins or OriginsConfig(**self.objective.origins)

    @property
    def origin_schedule(self) -> Schedule:
        """Which prompt of a step is answered by whom."""
        return Schedule(
            self.origins,
            prompts=self.data.prompts_per_step,
            samples=self.rollout.samples_per_prompt,
            steps=self.run.steps,
            seed=self.run.seed,
            processes=processes.count(),
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        """The padded lengths batches may have."""
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        return self.shapes.buckets or (longest,)
