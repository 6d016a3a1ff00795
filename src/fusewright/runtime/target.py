"""Where kernels run: on a GPU through the driver, or on the CPU in the simulator. Both take the same launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fusewright.chip import Chip, arch_of, chip_for
from fusewright.codegen.launch import LaunchSpec, TensorMapArg

# run(arguments in the launch's order, grid, device index)
Run = Callable[[Sequence[Any], tuple[int, int, int], int], None]

# Compiles and loads while graphs are still being planned.
BACKGROUND = ThreadPoolExecutor(thread_name_prefix="fusewright-load")


class Target(Protocol):
    @property
    def chip(self) -> Chip:
        """What kernels are compiled for."""

    @property
    def tensor_maps(self) -> bool:
        """Whether launches may take tensor maps here."""

    def prepare(self) -> None:
        """Loads what `load` will need, in the background, for a caller that has something else to do first."""

    def load(self, launches: Sequence[LaunchSpec]) -> list[Run]:
        """Compiles the launches together; returns how to run each."""

    def pointer(self, tensor: torch.Tensor, offset: int) -> Any:
        """What a launch takes for a pointer `offset` bytes past the tensor's first element."""

    def address(self, pointer: Any) -> int:
        """The address that a pointer holds."""

    def tensor_map(self, arg: TensorMapArg) -> Callable[[Any], Any]:
        """Pointer → what a launch takes for a map, whose sizes are numbers, of the tensor there."""


@dataclass(frozen=True)
class GpuTarget:
    """A CUDA device, kernels through NVRTC and the cache."""

    chip: Chip
    tensor_maps: bool = True

    @classmethod
    def of(cls, device: torch.device) -> GpuTarget:
        return cls(chip_for(arch_of(torch.cuda.get_device_capability(device))))

    def prepare(self) -> None:
        BACKGROUND.submit(load_toolkit)

    def load(self, launches: Sequence[LaunchSpec]) -> list[Run]:
        from fusewright.runtime.driver import load
        from fusewright.runtime.nvrtc import compile_all

        cubins = compile_all([launch.source for launch in launches], self.chip.arch)
        return [load(cubin, launch).launch for cubin, launch in zip(cubins, launches, strict=True)]

    def pointer(self, tensor: torch.Tensor, offset: int) -> int:
        return tensor.data_ptr() + offset

    def address(self, pointer: int) -> int:
        return pointer

    def tensor_map(self, arg: TensorMapArg) -> Callable[[Any], Any]:
        from fusewright.runtime.driver import tensor_map_encoder

        return tensor_map_encoder(arg)


@dataclass(frozen=True)
class SimulatorTarget:
    """The CPU, running the same CUDA source; schedules: how many thread orders each launch tries."""

    chip: Chip
    schedules: int = 1

    @property
    def tensor_maps(self) -> bool:
        return self.chip.arch == "sm_90a"  # whose instructions the simulator models

    def prepare(self) -> None:
        """Nothing takes long here."""

    def load(self, launches: Sequence[LaunchSpec]) -> list[Run]:
        from fusewright.simulator.simulate import Simulator

        def run(kernel: Any) -> Run:
            return lambda arguments, grid, _device: kernel(arguments, grid)

        return [run(k) for k in Simulator(self.chip).load(launches, schedules=self.schedules)]

    def pointer(self, tensor: torch.Tensor, offset: int) -> Any:
        from fusewright.simulator.buffer import Buffer

        whole = Buffer.of(tensor)
        return Buffer(whole.pointer + offset, whole.bytes - offset)

    def address(self, pointer: Any) -> int:
        return pointer.pointer  # type: ignore[no-any-return]

    def tensor_map(self, arg: TensorMapArg) -> Callable[[Any], Any]:
        from fusewright.simulator.tensor_map import encode

        return lambda buffer: encode(arg, buffer)


def load_toolkit() -> None:
    """Loads NVRTC and the driver's bindings. Raises ToolMissing."""
    from fusewright.runtime import driver, nvrtc

    nvrtc.prepare()
    driver.version()
