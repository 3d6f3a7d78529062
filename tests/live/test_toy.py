"""The genuine server with the toy teacher, as the teacher of a run."""

from pathlib import Path

import pytest

from .conftest import ATOL, Server, need, train, with_teacher

pytestmark = pytest.mark.live


def test_the_quickstart_with_the_genuine_server_is_the_quickstart(genuine: Server, tmp_path: Path) -> None:
    """Five steps of it: the first agrees with the embedded teacher's to rounding, the last nearly."""
    need(genuine, "toy_teacher")
    table = train(tmp_path / "genuine", config=with_teacher(genuine, tmp_path))
    embedded = train(tmp_path / "embedded")
    for name in ("loss", "reverse_kl_per_byte", "coverage", "exact_fraction"):
        assert abs(table[0][name] - embedded[0][name]) <= 10 * ATOL, name
        assert abs(table[4][name] - embedded[4][name]) <= 1e-2, name
