"""Autocast, scaled gradients, checkpointing and what else surrounds a model in training; and a second GPU."""

from __future__ import annotations

import pytest
import torch

from training_features import Features

pytestmark = pytest.mark.gpu

FEATURES = ["without_gradients", "scaler", "checkpointing", "accumulation", "state", "deep_copy", "exported", "threads"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    Features("cuda").autocast(dtype)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str) -> None:
    getattr(Features("cuda"), feature)()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_gpu_while_the_first_is_current() -> None:
    """A model on cuda:1, then one on each in turn: kernels are loaded for, and run on, the tensors' device."""
    second = Features("cuda:1")
    assert torch.cuda.current_device() == 0
    second.accumulation()
    second.autocast(torch.bfloat16)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        Features(device).checkpointing()
    assert torch.cuda.current_device() == 0


def test_threads_on_streams_of_their_own() -> None:
    """Kernels run on the stream that is current in the calling thread."""
    features = Features("cuda")
    model = features.block()
    call = features.compiled(model)
    expected = model(features.batch()).detach()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        x = features.batch()
        for _ in range(20):
            found = call(x)
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
