"""Lets a program that asks for `cuda` run on a machine without a GPU, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def without_gpu() -> Iterator[None]:
    """Within it whatever asks for a CUDA device gets the CPU. Where there is a CUDA device, it changes nothing.

    `torch.cuda.is_available()` stays false, and what only a device can do (`torch.cuda.synchronize`) still raises.
    """
    if torch.cuda.is_available():
        yield
        return
    with patch.object(torch, "Generator", _CpuGenerator), _OnCpu():
        yield


class _OnCpu(TorchFunctionMode):
    """Replaces devices in the arguments of torch's functions; of `torch.device` too, and so of all that build one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.unflatten:  # calls super(), which Dynamo cannot follow from within a mode
            func = torch.unflatten
        if func is Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], "cpu", *args[2:])
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if type(kwargs.get("device")) is int:
            kwargs["device"] = "cpu"
        return func(*map(_on_cpu, args), **kwargs)


class _CpuGenerator(torch.Generator):
    """`torch.Generator` takes its device past the function mode."""

    def __new__(cls, device: Any = "cpu") -> _CpuGenerator:
        return super().__new__(cls, _on_cpu(device))  # type: ignore[call-arg]  # the stub has it in __init__


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str):
        return "cpu" if value == "cuda" or value.startswith("cuda:") else value
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value
