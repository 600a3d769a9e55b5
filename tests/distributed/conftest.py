"""Fixtures shared with the unit tests."""

from tests.unit.conftest import settings, token_folder  # noqa: F401
