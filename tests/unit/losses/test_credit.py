"""Credit rules against a loop written from their definitions, and their properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.losses.credit import token_advantages

RULES = ("broadcast", "uniform", "proportional", "lookahead", "chunk")
WIDTH = 14


def reference(credit, chunks, teacher, student, clip):
    """One row, straight from the text of the module; -1 is no chunk."""
    advantage, mask = np.zeros(len(chunks)), np.array([c >= 0 for c in chunks])
    for chunk in sorted({c for c in chunks if c >= 0}):
        members = [i for i, c in enumerate(chunks) if c == chunk]
        total = sum(student[i] for i in members)
        difference = float(np.clip(teacher[members[0]] - total, -clip, clip))
        for i in members:
            if credit == "uniform":
                advantage[i] += difference / len(members)
            elif credit == "proportional":
                advantage[i] += difference * student[i] / total if total < 0 else 0.0
            elif credit != "chunk" or i == members[-1]:
                advantage[i] += difference
        after = members[-1] + 1
        if credit == "lookahead" and after < len(chunks):
            advantage[after] += difference
            mask[after] = True
    return advantage, mask


@st.composite
def rows(draw):
    """A row of up to 12 response tokens cut into chunks, some of them unaligned, then padding."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    aligned = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    chunks, teacher, number = [], [], 0
    for size, is_aligned in zip(sizes, aligned, strict=True):
        value = draw(st.floats(-20, 0, width=32))
        chunks += [number if is_aligned else -1] * size
        teacher += [value if is_aligned else 0.0] * size
        number += is_aligned
    student = [draw(st.floats(-8, -0.125, width=32)) for _ in chunks]
    return chunks[:12], teacher[:12], student[:12]


@pytest.mark.parametrize("credit", RULES)
@settings(max_examples=25)
@given(row=rows())
def test_each_rule_is_its_definition(credit, row):
    chunks, teacher, student = row
    pad = WIDTH - len(chunks)
    padded_chunks = np.array(chunks + [-1] * pad, np.int32)
    got, mask = token_advantages(
        credit,
        chunk_of_token=jnp.asarray(padded_chunks)[None],
        teacher_logprob=jnp.asarray(teacher + [np.nan] * pad, jnp.float32)[None],
        student_logprobs=jnp.asarray(student + [np.nan] * pad, jnp.float32)[None],
        mask=jnp.asarray(padded_chunks >= 0)[None],
        same_vocabulary=jnp.zeros(1, bool),
        clip=10.0,
    )
    wanted, wanted_mask = reference(credit, padded_chunks, teacher + [0.0] * pad, student + [0.0] * pad, 10.0)
    np.testing.assert_allclose(got[0], wanted, atol=1e-4)
    np.testing.assert_array_equal(mask[0], wanted_mask)


def test_with_one_token_a_chunk_all_rules_are_the_textbook_for_a_teacher_of_the_same_vocabulary():
    # Row 1 is of a teacher with another vocabulary, whose cuts only happen to fit: lookahead is itself there.
    student = jnp.asarray([[-1.0, -2.0, -0.5]] * 2)
    teacher = jnp.asarray([[-0.5, -3.0, -0.5]] * 2)
    arguments = {
        "chunk_of_token": jnp.asarray([[0, 1, 2]] * 2, jnp.int32),
        "teacher_logprob": teacher,
        "student_logprobs": student,
        "mask": jnp.ones((2, 3), bool),
        "same_vocabulary": jnp.asarray([True, False]),
        "clip": 10.0,
    }
    for credit in ("broadcast", "uniform", "proportional", "chunk"):
        np.testing.assert_allclose(token_advantages(credit, **arguments)[0], teacher - student, atol=1e-6)
    lookahead = token_advantages("lookahead", **arguments)[0]
    np.testing.assert_allclose(lookahead[0], (teacher - student)[0], atol=1e-6)
    np.testing.assert_allclose(lookahead[1], [0.5, -1.0 + 0.5, 0.0 - 1.0], atol=1e-6)
