"""torch's flags as `verify` reads them before and after a candidate."""

from types import SimpleNamespace

import pytest
import torch

from fusewright.tools.flags import torch_flags


def use_cuda(monkeypatch: pytest.MonkeyPatch, device: int, stream: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=stream))


def test_a_first_use_of_cuda_is_no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = torch_flags()
    use_cuda(monkeypatch, device=0, stream=0)
    assert torch_flags() == before


def test_another_device_and_stream_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = torch_flags()
    use_cuda(monkeypatch, device=1, stream=94_000)
    after = torch_flags()
    assert {name for name in after if after[name] != before[name]} == {"current CUDA device", "current CUDA stream"}
