"""What tests with limits in seconds share."""

from collections.abc import Iterator

import pytest

from .stalls import Stalls


@pytest.fixture(scope="session")
def stalls() -> Iterator[Stalls]:
    """How long the machine itself stood still."""
    with Stalls() as watching:
        yield watching
