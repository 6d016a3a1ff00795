"""What is kept of frozen parameters: for how long, and for which CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from test_graphs import FakeRecorder, shapes

from fusewright.runtime import frozen
from fusewright.runtime.graphs import Replayed


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    frozen.thaw()
    frozen._CAPTURED.clear()
    yield
    frozen.thaw()
    frozen._CAPTURED.clear()


def double(parameter: torch.Tensor) -> torch.Tensor:
    return frozen.kept(parameter, "double", lambda: parameter * 2)


def test_made_once_and_forgotten_with_the_parameter() -> None:
    parameter = torch.ones(3)
    made = double(parameter)
    assert double(parameter) is made
    gone, others = weakref.ref(made), [torch.ones(3) for _ in range(2)]
    del parameter, made
    double(others[0])  # forgets what belongs to nobody
    gc.collect()
    assert gone() is None


def test_captured_by_the_user_it_stays_once_and_for_as_long_as_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, other = torch.ones(3), torch.ones(3)
    gone = weakref.ref(double(parameter))
    monkeypatch.setattr(frozen, "_capturing", lambda source: True)
    for _ in range(5):
        double(parameter)
    monkeypatch.undo()
    assert len(frozen._CAPTURED) == 1
    frozen.thaw()
    gc.collect()
    assert gone() is not None
    del parameter
    double(other)
    gc.collect()
    assert gone() is None and not frozen._CAPTURED


def test_a_recording_keeps_what_it_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else does: when it goes, for a thaw or with its model, so does that."""
    x, parameter = torch.ones(3), torch.ones(3)

    class Recorder(FakeRecorder):
        def record(self, run, arguments):  # type: ignore[no-untyped-def]
            with monkeypatch.context() as patch:
                patch.setattr(frozen, "_capturing", lambda source: True)
                return super().record(run, arguments)

    call = Replayed(lambda x, w: [x + double(w)], shapes, Recorder(), frozen=[1])
    for _ in range(3):
        call(x, parameter)
    gone = weakref.ref(double(parameter))
    frozen.thaw()
    gc.collect()
    assert gone() is not None and not frozen._CAPTURED
    call(x, parameter)
    gc.collect()
    assert gone() is None
