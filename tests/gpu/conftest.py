"""Each test starts with nothing compiled."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(nothing_compiled: None) -> None:
    pass
