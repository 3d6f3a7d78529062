"""The configuration of a whole run: the components' configs joined, and what must hold between them."""

from pathlib import Path

from pydantic import Field, model_validator

from jaxdistill.checkpoint import CheckpointConfig
from jaxdistill.config import StrictConfig
from jaxdistill.data import DataConfig
from jaxdistill.evaluate import EvalConfig
from jaxdistill.losses import ObjectiveConfig
from jaxdistill.losses.reverse_kl import ReverseKLConfig
from jaxdistill.optimizer import OptimizerConfig
from jaxdistill.packing import ShapesConfig
from jaxdistill.parallel import MeshConfig
from jaxdistill.samplers import OriginsConfig, RolloutConfig, Schedule
from jaxdistill.teachers import ReplayConfig, ServedSettings, TeacherConfig

_METRIC_GROUPS = frozenset({"eval", "seconds"})


class RunSection(StrictConfig):
    """Length, place and seed of the run. The same seed, data and models give the same run."""

    steps: int = Field(ge=1)
    dir: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    tensorboard: bool = True


class StudentConfig(StrictConfig):
    """The model that learns: a folder in Hugging Face format. `roles` overrides which token
    plays which role, e.g. {end_of_turn: "<|im_end|>"}."""

    path: str
    roles: dict[str, str] = Field(default_factory=dict)


class RunConfig(StrictConfig):
    """One YAML file of `configs/`."""

    run: RunSection
    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: tuple[TeacherConfig, ...] = ()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ReverseKLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    shapes: ShapesConfig = ShapesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.buckets[-1] < self.rollout.max_prompt_tokens + self.rollout.max_new_tokens:
            raise ValueError(
                f"shapes.buckets={list(self.buckets)} cannot hold a prompt of rollout.max_prompt_tokens="
                f"{self.rollout.max_prompt_tokens} with rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
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
        if taken := sorted(set(names) & _METRIC_GROUPS):
            raise ValueError(f"a teacher cannot be called {taken[0]!r}: metrics have a group of that name")
        if self.objective.needs_teacher and not self.all_teachers:
            raise ValueError(
                f"objective.kind={self.objective.kind} needs a teacher: section (objective.kind=sft does not)"
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
        self.objective.check_temperature(self.rollout.temperature)
        return self

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
        )

    @property
    def buckets(self) -> tuple[int, ...]:
        """The padded lengths batches may have."""
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        return self.shapes.buckets or (longest,)
