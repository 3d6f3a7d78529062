"""What the registries promise: each entry can be named in a config, and each config kind is an entry."""

from pathlib import Path
from typing import get_args

import pytest

from jaxdistill.losses import OBJECTIVES, Objective, ObjectiveConfig, Vocabularies, build_objective
from jaxdistill.losses.sum import SumConfig, TermConfig
from jaxdistill.teachers import BUILDERS, TeacherConfig
from jaxdistill.text import Tokenizer

TOY = Path(__file__).parents[2] / "assets" / "toy"


def kinds(union) -> dict[str, type]:
    """The config classes of a union told apart by `kind`, those of unions in it too."""
    members = get_args(get_args(union)[0])
    found = {}
    for member in members:
        found |= kinds(member) if get_args(member) else {member.model_fields["kind"].default: member}
    return found


@pytest.fixture(scope="module")
def vocabularies() -> Vocabularies:
    return Vocabularies(Tokenizer.load(str(TOY / "student")), (Tokenizer.load(str(TOY / "teacher")),))


def test_every_objective_has_a_config_of_its_kind_and_nothing_else_does():
    assert set(kinds(ObjectiveConfig)) == set(OBJECTIVES)


@pytest.mark.parametrize("top_k", [True, False])
@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_every_config_builds_its_objective(kind, top_k, vocabularies):
    cls = kinds(ObjectiveConfig)[kind]
    single = kinds(ObjectiveConfig)["reverse_kl"]()
    config = SumConfig(terms=(TermConfig(objective=single),)) if kind == "sum" else cls()
    objective = build_objective(config.resolved(top_k=top_k), vocabularies)
    assert isinstance(objective, Objective) and type(objective) is OBJECTIVES[kind]


def test_every_teacher_kind_has_a_builder_and_nothing_else_does():
    assert sorted(kinds(TeacherConfig)) == sorted(BUILDERS)
