"""A launch that the chip would refuse is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fusewright.chip import chip_for
from fusewright.codegen.launch import FloatArg, LaunchSpec, SizeArg, TensorMapArg
from fusewright.simulator.buffer import Buffer
from fusewright.simulator.errors import LaunchLimit, SimulationError, Where
from fusewright.simulator.simulate import Simulator
from fusewright.simulator.tensor_map import encode
from kernels import launch

EMPTY = launch('extern "C" __global__ void __launch_bounds__(2 * (32)) empty(float* x, long long n) {}', 64)
DYNAMIC = """extern "C" __global__ void dynamic(float* x, long long n) {
    extern __shared__ float d[];
    __shared__ float s[8];
    s[threadIdx.x % 8] = 1;
    if (threadIdx.x == 0) { d[n - 1] = 2; x[0] = d[n - 1] + s[n % 8]; } }"""
STATIC = """extern "C" __global__ void static_(float* x) {
    __shared__ float s[12289];
    s[threadIdx.x] = 1;
    x[0] = s[int(x[0])]; }
extern "C" __global__ void none(float* x) {}"""


def load(spec: LaunchSpec, arch: str = "sm_90a") -> None:
    Simulator(chip_for(arch)).load([spec])


@pytest.mark.parametrize("block", [(1025, 1, 1), (1, 1, 65), (32, 33, 1), (0, 1, 1)])
def test_block(block: tuple[int, int, int]) -> None:
    with pytest.raises(LaunchLimit, match="1 to 1024 threads"):
        load(replace(EMPTY, block=block))


def test_launch_bounds() -> None:
    load(EMPTY)
    with pytest.raises(LaunchLimit, match="96 threads, but __launch_bounds__ allows 64"):
        load(replace(EMPTY, block=(96, 1, 1)))


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (-1, 1, 1)])
def test_grid(grid: tuple[int, int, int]) -> None:
    (kernel,) = Simulator().load([EMPTY])
    with pytest.raises(LaunchLimit, match="65535"):
        kernel([torch.zeros(1), 0], grid)


def test_dynamic_shared_memory_up_to_the_chip() -> None:
    spec = launch(DYNAMIC, 8)
    most = chip_for("sm_90a").shared_bytes - 32
    (kernel,) = Simulator().load([replace(spec, shared_bytes=most)])
    kernel([x := torch.zeros(1), most // 4], (1,))
    assert x[0] == 3
    with pytest.raises(LaunchLimit, match="232448"):
        load(replace(spec, shared_bytes=most + 4))
    with pytest.raises(LaunchLimit, match="101376"):
        load(replace(spec, shared_bytes=most), "sm_89")


def test_static_shared_memory_of_the_kernel_alone() -> None:
    with pytest.raises(LaunchLimit, match="49156 bytes of static shared memory"):
        load(launch(STATIC, 1))
    load(replace(launch(STATIC, 1), kernel="none"))


def test_arguments_must_fit_the_parameters() -> None:
    with pytest.raises(LaunchLimit, match="has 2 parameters, and the launch gives 1"):
        load(replace(EMPTY, args=EMPTY.args[:1]))
    with pytest.raises(LaunchLimit, match="parameter 1 has 8 bytes"):
        load(replace(EMPTY, args=(SizeArg(0), FloatArg(1.0))))
    (kernel,) = Simulator().load([EMPTY])
    with pytest.raises(LaunchLimit, match="takes 2 arguments, and was given 1"):
        kernel([torch.zeros(1)], (1,))


def test_clusters() -> None:
    with pytest.raises(LaunchLimit, match="1 to 16"):
        load(replace(EMPTY, cluster=(4, 3, 2)))
    with pytest.raises(LaunchLimit, match="has none"):
        load(replace(EMPTY, cluster=(2, 1, 1)), "sm_80")
    (kernel,) = Simulator().load([replace(EMPTY, cluster=(2, 1, 1))])
    with pytest.raises(LaunchLimit, match="not made of clusters"):
        kernel([torch.zeros(1), 1], (3, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "grid", "says"),
    [
        (
            [torch.zeros(1, dtype=torch.float64), 1],
            (1,),
            "`x` of torch.float32, and was given a tensor of torch.float64",
        ),
        ([torch.zeros(1, dtype=torch.int32), 1], (1,), "`x` of torch.float32"),
        (["x", 1], (1,), "`x`, a tensor, and was given 'x'"),
        ([torch.zeros(1), torch.ones(1)], (1,), "a number, and was given memory"),
        ([torch.zeros(1), 2**70], (1,), "a whole number of 64 bits"),
        ([torch.zeros(1), 6.5], (1,), "a whole number of 64 bits, and was given 6.5"),
        ([torch.zeros(1), "6"], (1,), "a whole number of 64 bits"),
        ([torch.zeros(1), 1], (1.5,), "a grid"),
        ([torch.zeros(1), 1], (), "a grid"),
        ([torch.zeros(1), 1], (1, 1, 1, 1), "a grid"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[Any], grid: tuple[Any, ...], says: str) -> None:
    (kernel,) = Simulator().load([EMPTY])
    with pytest.raises(LaunchLimit, match=says) as caught:
        kernel(arguments, grid)
    assert isinstance(caught.value, SimulationError)
    assert caught.value.where == Where("empty")


@pytest.mark.parametrize("value", ["1.5", None, pytest.param(2**2000, id="large"), torch.ones(())])
def test_numbers(value: Any) -> None:
    (kernel,) = Simulator().load([launch('extern "C" __global__ void f(float x) {}', 1)])
    with pytest.raises(LaunchLimit, match="argument 0 is a number"):
        kernel([value], (1,))
    for fitting in (1, 1.5, float("inf"), np.float32(2)):
        kernel([fitting], (1,))


def test_integers_of_one_size_are_alike() -> None:
    (kernel,) = Simulator().load([launch('extern "C" __global__ void f(const uint8_t* x) {}', 1)])
    for dtype in (torch.uint8, torch.int8, torch.bool):
        kernel([torch.zeros(1, dtype=dtype)], (1,))


def test_shared_bytes_are_not_negative() -> None:
    with pytest.raises(LaunchLimit, match="-1 bytes of static and dynamic"):
        load(replace(EMPTY, shared_bytes=-1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dims": (64, 64), "strides": (64,)}, "one extent of the box"),
        ({"strides": (65, 4096)}, "a stride that is no multiple of 16 bytes"),
        ({"dims": (64, 0, 1)}, "an extent"),
        ({"box": (64, 257, 1)}, "1 to 256 elements"),
        ({"box": (4, 64, 1)}, "8 bytes wide, no multiple of 16"),
        ({"box": (128, 64, 1)}, "must agree"),
        ({"swizzle": 48}, "a swizzle of 48"),
        ({}, "begins at an address"),
    ],
)
def test_tensor_maps(change: dict[str, object], says: str) -> None:
    arg = TensorMapArg("x", torch.float16, (64, 64, 1), (64, 4096), (64, 64, 1))
    whole = Buffer.of(torch.zeros(64, 64, dtype=torch.float16))
    encode(arg, whole)
    with pytest.raises(LaunchLimit, match=says):
        encode(replace(arg, **change), whole if change else Buffer(whole.pointer + 2, whole.bytes - 2))
