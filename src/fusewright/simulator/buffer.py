"""Memory of the host as the simulator's kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusewright.errors import MixedDevices


@dataclass(frozen=True)
class Buffer:
    """Host memory that a kernel may touch: `bytes` bytes from address `pointer`."""

    pointer: int
    bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Buffer:
        """The memory from a CPU tensor's first element to its last. Raises MixedDevices for any other device."""
        if tensor.device.type != "cpu":
            raise MixedDevices(f"the simulator runs on CPU tensors, and was given one on {tensor.device}")
        if tensor.numel() == 0:
            return cls(0, 0)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.data_ptr(), (last + 1) * tensor.element_size())
