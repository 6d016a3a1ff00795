"""Autocast, scaled gradients, checkpointing and what else surrounds a model in training, on the simulator."""

from __future__ import annotations

import pytest
import torch

from training_features import Features

ON_SIMULATOR = Features("cpu", {"simulate": True})


pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    ON_SIMULATOR.autocast(dtype)


@pytest.mark.parametrize(
    "feature",
    ["without_gradients", "scaler", "checkpointing", "accumulation", "state", "deep_copy", "exported", "threads"],
)
def test_feature(feature: str) -> None:
    getattr(ON_SIMULATOR, feature)()
