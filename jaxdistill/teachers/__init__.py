"""Teachers: who scores the student's responses. One entry in `BUILDERS` a kind."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from jaxdistill.teachers.base import Teacher, View, teacher_view, teacher_views, tokenizer_doubt
from jaxdistill.teachers.config import (
    EmbeddedConfig,
    ReplayConfig,
    ServedSettings,
    SGLangConfig,
    TeacherConfig,
)
from jaxdistill.teachers.embedded import EmbeddedTeacher
from jaxdistill.teachers.identity import TeacherIdentity
from jaxdistill.teachers.replay import ReplayTeacher
from jaxdistill.teachers.routing import Routes, Teachers
from jaxdistill.teachers.sglang import SGLangTeacher
from jaxdistill.text import Tokenizer

logger = logging.getLogger(__name__)

BUILDERS: Mapping[str, Callable[[Any, Tokenizer], SGLangTeacher | EmbeddedTeacher | ReplayTeacher]] = {
    "sglang": SGLangTeacher,
    "embedded": EmbeddedTeacher,
    "replay": ReplayTeacher,
}


def build(config: TeacherConfig, tokenizer: Tokenizer) -> Teacher:
    """The configured teacher, reached and answering; `tokenizer` is what its config loads.

    Raises `ConfigError`, `TeacherUnavailable` or `TeacherContractError`; nothing is left running then.
    """
    with ExitStack() as undo:
        teacher = BUILDERS[config.kind](config, tokenizer)
        undo.callback(teacher.close)
        teacher.check()
        undo.pop_all()
    return teacher


def build_all(configs: Sequence[TeacherConfig], tokenizers: Sequence[Tokenizer], *, seed: int) -> Teachers:
    """The teachers of a run, each reached and answering, with their tokenizers in the same order; raises as
    `build` does. A tokenizer that nothing proves to be the served model's own is warned of."""
    with ExitStack() as undo:
        members: list[Teacher] = []
        for config, tokenizer in zip(configs, tokenizers, strict=True):
            members.append(build(config, tokenizer))
            undo.callback(members[-1].close)
            if doubt := tokenizer_doubt(members[-1]):
                logger.warning("%s", doubt)
        undo.pop_all()
    return Teachers(members, Routes(configs, seed))


__all__ = [
    "BUILDERS",
    "EmbeddedConfig",
    "EmbeddedTeacher",
    "ReplayConfig",
    "ReplayTeacher",
    "Routes",
    "SGLangConfig",
    "SGLangTeacher",
    "ServedSettings",
    "Teacher",
    "TeacherConfig",
    "TeacherIdentity",
    "Teachers",
    "View",
    "build",
    "build_all",
    "teacher_view",
    "teacher_views",
    "tokenizer_doubt",
]
