"""Where the tests of the device code run."""

from __future__ import annotations

import pytest
import torch
from device import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Of what device the tensors are: the CPU's go to the simulator."""
    return request.param


@pytest.fixture
def need_hopper(request: pytest.FixtureRequest) -> None:
    """GPU tests need the one whose instructions these are."""
    if request.node.get_closest_marker("gpu") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
