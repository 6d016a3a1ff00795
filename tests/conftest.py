"""What all tests share: those that need a GPU are skipped without one, and each run begins with an empty cache."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

CACHE = "FUSEWRIGHT_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """Makes the run's cache. Worker processes inherit it, so that one compiles what all of them use."""
    if not hasattr(config, "workerinput"):
        os.environ[CACHE] = tempfile.mkdtemp(prefix="fusewright-tests-")
    # A shell ignores interrupts for what it starts in the background, and tests send some.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """A test starts with nothing compiled, so that it counts its own compilations only, and with the same seed."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
