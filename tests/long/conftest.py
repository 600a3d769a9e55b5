"""The fixtures of tests/integration."""

from tests.integration.conftest import recipe, whole  # noqa: F401
