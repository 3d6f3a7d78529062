"""A headless browser, as the pages of the package itself are opened with."""

from tests.unit.conftest import browse

__all__ = ["browse"]
