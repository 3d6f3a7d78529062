"""What the registries promise: each entry can be named in a config, and each config kind is an entry."""

from typing import get_args

from jaxdistill.losses import OBJECTIVES, Objective, ObjectiveConfig
from jaxdistill.teachers import BUILDERS, TeacherConfig


def test_every_objective_has_a_config_of_its_kind_and_nothing_else_does():
    union = get_args(ObjectiveConfig)[0]
    assert {config.model_fields["kind"].default for config in get_args(union)} == set(OBJECTIVES)
    for config in get_args(union):
        assert isinstance(OBJECTIVES[config.model_fields["kind"].default](config()), Objective)


def test_every_teacher_kind_has_a_builder_and_nothing_else_does():
    kinds = [config.model_fields["kind"].default for config in get_args(get_args(TeacherConfig)[0])]
    assert sorted(kinds) == sorted(BUILDERS)
