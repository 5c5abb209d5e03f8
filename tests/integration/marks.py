"""A parameter of a test that repeats its promise: `make test` leaves it out, and `make test-all` runs it."""

from typing import Any

import pytest


def again(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.again)
