"""Teachers: who scores the student's responses. One entry in `BUILDERS` a kind."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from jaxdistill.teachers.base import Teacher, TeacherConfig, teacher_view
from jaxdistill.teachers.embedded import EmbeddedTeacher
from jaxdistill.teachers.sglang import SGLangTeacher

BUILDERS: Mapping[str, Callable[[TeacherConfig], SGLangTeacher | EmbeddedTeacher]] = {
    "sglang": SGLangTeacher,
    "embedded": EmbeddedTeacher,
}


def build(config: TeacherConfig) -> Teacher:
    """The configured teacher, reached and answering.

    Raises `ConfigError`, `TeacherUnavailable` or `TeacherContractError`; nothing is left running then.
    """
    teacher = BUILDERS[config.kind](config)
    with ExitStack() as undo:
        undo.callback(teacher.close)
        teacher.check()
        undo.pop_all()
    return teacher


__all__ = [
    "BUILDERS",
    "EmbeddedTeacher",
    "SGLangTeacher",
    "Teacher",
    "TeacherConfig",
    "build",
    "teacher_view",
]
