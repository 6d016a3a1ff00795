"""Hopper's instructions one by one: what their documentation says, what the simulator does, and what the GPU does.

The simulator is held everywhere to what each case (hopper_cases.py) says must come out; on a Hopper GPU the two must
agree to the last bit. docs/simulator.md names them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hopper_cases import CASES, differences

DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.parametrize("name", CASES)
def test_simulator_does_what_is_documented(name: str) -> None:
    assert not differences(*CASES[name]("cpu"))


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_does_the_same(name: str) -> None:
    simulated, _ = CASES[name]("cpu")
    real, _ = CASES[name]("cuda")
    assert not differences(simulated, real)


def test_table_names_every_case() -> None:
    rows = re.findall(r"^\|(.*)\|$", DOCS.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-1])}
    assert named == CASES.keys()
