"""What ends a launch from outside, and what must not outlive it: interrupts, faults, handlers of signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fusewright.simulator.simulate import Simulator
from kernels import launch


@pytest.mark.parametrize(
    "work", ["", 'for (int i = 0; i < 300000000; ++i) asm volatile("");'], ids=["reads", "computes"]
)
@pytest.mark.parametrize("blocks", [1, 4])
def test_an_interrupt_ends_a_launch(work: str, blocks: int) -> None:
    """Whatever the kernel does just then, on one or more OS threads; and the next launch runs."""
    text = f"""extern "C" __global__ void endless(int* out) {{
        volatile int* stop = out;
        for (int i = 1; *stop == 0; ++i) {{ out[threadIdx.x + 1] = i; {work} }} }}"""
    (kernel,) = Simulator(workers=2).load([launch(text, 1)])
    out = torch.zeros(2, dtype=torch.int32)

    def interrupt() -> None:
        while not out[1]:  # until the kernel runs
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    timers = [threading.Timer(0.0, interrupt), threading.Timer(20, out[0].fill_, (1,))]  # so that a failure ends too
    for timer in timers:
        timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            kernel([out], (blocks,))
        assert time.monotonic() - start < 15
    finally:
        for timer in timers:
            timer.cancel()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    kernel([torch.ones(2, dtype=torch.int32)], (blocks,))


def test_faults_elsewhere_end_the_process_as_ever() -> None:
    """A launch that went wrong leaves no handlers behind."""
    text = 'extern "C" __global__ void divides(int* out, long long n) { out[0] = 7 / int(n); }'
    code = f"""import ctypes, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fusewright.simulator.simulate import Simulator
from kernels import launch
try:
    Simulator().load([launch({text!r}, 1)])[0]([torch.zeros(1, dtype=torch.int32), 0], (1,))
except Exception as error:
    print(type(error).__name__)
sys.stdout.flush()
ctypes.string_at(0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("UndefinedOperation\n", -signal.SIGSEGV), done.stderr
