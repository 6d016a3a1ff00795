"""Which of several programs runs, and that the choice lasts. On the simulator; times are made up."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.chip import chip_for
from fusewright.errors import InvalidSetting
from fusewright.fusion.plan import FusionPlan
from fusewright.kernels.base import Program
from fusewright.kernels.choose import candidates
from fusewright.runtime import autotune
from fusewright.runtime.autotune import Tuned, _agrees, remembered, title
from fusewright.runtime.cache import Cache
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget
from fusewright.tuned import parse
from graphs import check

CHIP = chip_for("sm_80")
X, W, B = torch.randn(12, 8), torch.randn(4, 8), torch.randn(4)


class Clock:
    """Gives candidates the times that a test wants, and counts how often it is asked."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, timed: Mapping[int, Sequence[Any]], environment: Any) -> dict[int, float]:
        self.asked += 1
        self.candidates = list(timed)
        return {index: self.seconds[index] for index in timed}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # A chip of each test's own: choices are remembered by chip, and compiled simulations may be shared.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: str(tmp_path))
    monkeypatch.setattr(autotune.driver, "version", lambda: 1)


@pytest.fixture(scope="module")
def contest() -> tuple[FusionPlan, str, list[Program]]:
    """A plan of one region, and two programs for it: ours, then the library's."""

    record = check(lambda x, w, b: (x @ w.t() + b).relu(), X, W, B, tolerance=1e-5)
    made = record.plans[0]
    ((region, found),) = candidates(made, CHIP, library=True).items()
    return made, region, [found[0], next(p for p in found if p.library)]


def tuned(
    contest: tuple[FusionPlan, str, list[Program]], programs: list[Program] | None = None, given: str = ""
) -> Tuned:
    made, region, usual = contest
    programs = programs or usual
    executable = Executable(made, {region: programs[0]}, SimulatorTarget(CHIP), torch.device("cpu"), programs)
    return Tuned(executable, {region: programs}, parse(given), {region: programs} if given else {})


def run(built: Tuned) -> str:
    """The family that was chosen; its results are right at the call that chooses, and after."""
    expected = (X @ W.t() + B).relu()
    for _ in range(2):
        (result,) = built(X, W, B)
        torch.testing.assert_close(result, expected)
    (program,) = built.executable.programs.values()
    return program.family


@pytest.mark.parametrize(
    ("seconds", "family"),
    [((1.0, 2.0), "gemm_simt"), ((2.0, 1.0), "library"), ((1.0, 0.99), "gemm_simt"), ((1.0, 0.95), "library")],
)
def test_the_fastest_runs_and_the_library_only_if_it_wins_clearly(
    contest: Any, seconds: tuple[float, float], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_times", Clock(*seconds))
    assert run(tuned(contest)) == family


def test_a_choice_is_remembered_on_disk(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Clock(2.0, 1.0), Clock(1.0, 2.0)
    monkeypatch.setattr(autotune, "_times", first)
    assert run(tuned(contest)) == "library"
    monkeypatch.setattr(autotune, "_times", second)
    assert run(tuned(contest)) == "library"
    assert (first.asked, second.asked) == (1, 0)


def test_a_candidate_that_is_wrong_is_named_and_not_timed(
    contest: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, library = contest[2]
    assert library.library is not None
    wrong = replace(library, library=replace(library.library, bias=None))
    clock = Clock(2.0, 1.0)
    monkeypatch.setattr(autotune, "_times", clock)
    with caplog.at_level(logging.WARNING):
        assert run(tuned(contest, [ours, wrong])) == "gemm_simt"
    assert clock.candidates == [0]
    assert "library" in caplog.text and "differs" in caplog.text


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([1.0, -2.0, 1000.0, 0.5], True),
        ([1.0, -2.0, 1004.0, 9.0], True),  # 1 % of the largest, of 1000
        ([1.0, -2.0, 1000.0, 12.0], False),
        ([1.0, -2.0, -1000.0, 0.5], False),
        ([1.0, -2.0, INF, 0.5], False),
        ([1.0, NAN, 1000.0, 0.5], False),
    ],
)
def test_results_agree_to_a_share_of_the_largest(dtype: torch.dtype, other: list[float], same: bool) -> None:
    expected = torch.tensor([1.0, -2.0, 1000.0, 0.5], dtype=dtype)
    assert _agrees(torch.tensor(other, dtype=dtype), expected) == same


def test_what_is_not_finite_has_no_say() -> None:
    """One infinity would make everything else agree; what overflows in one program may be just finite in another."""
    expected = torch.ones(300)
    expected[:3] = torch.tensor([INF, -INF, NAN])
    assert _agrees(expected.clone(), expected)
    other = expected.clone()
    other[2] = 3e38
    assert _agrees(other, expected)
    other[100] = 1.1
    assert not _agrees(other, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_few_bits_of_a_mask_may_differ(dtype: torch.dtype) -> None:
    expected = torch.zeros(1000, dtype=dtype)
    for count, same in ((10, True), (11, False)):
        other = expected.clone()
        other[:count] = 128
        assert _agrees(other, expected) == same


def test_integers_agree_as_floats_do() -> None:
    expected = torch.tensor([-1000, 3, 2**31 - 1])
    assert _agrees(expected + 1, expected) and not _agrees(-expected, expected)


def test_empty_results_agree() -> None:
    assert _agrees(torch.empty(0), torch.empty(0))


def test_nothing_is_measured_while_a_graph_is_captured(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(2.0, 1.0)
    monkeypatch.setattr(autotune, "_times", clock)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run(tuned(contest)) == "gemm_simt"
    assert clock.asked == 0


# ---- as text


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """The text of the last choices, without what introduces it."""
    (message,) = [r.getMessage() for r in caplog.records if "setting `tuned`" in r.getMessage()]
    caplog.clear()
    return message.split("\n", 1)[1]


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)])
def test_a_choice_is_logged_and_its_text_decides(
    contest: Any, seconds: tuple[float, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "_times", Clock(*seconds))
    with caplog.at_level(logging.INFO, logger="fusewright"):
        first = tuned(contest)
        family = run(first)
        line = logged(caplog)
        assert line.startswith(f"{contest[1]} float32 nt 12x4x8: {family}")
        other = Clock(*reversed(seconds))
        monkeypatch.setattr(autotune, "_times", other)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another chip")  # of which nothing is known
        second = tuned(contest, given=line)
        assert run(second) == family
        assert other.asked == 0 and logged(caplog) == line
    assert second.executable.programs == first.executable.programs


def test_the_text_decides_while_a_graph_is_captured(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run(tuned(contest, given=f"{contest[1]} float32 nt 12x4x8: library addmm")) == "library"


@pytest.mark.parametrize("change", ["nt 12x4x8", "nn 12x4x8", "nt 16x4x8", "nt 12x4"])
def test_text_for_something_else_decides_nothing(contest: Any, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layout, other sizes. Sizes between the same powers of two are the same."""
    clock = Clock(1.0, 2.0)
    monkeypatch.setattr(autotune, "_times", clock)
    fits = change == "nt 12x4x8"
    assert run(tuned(contest, given=f"{contest[1]} float32 {change}: library addmm")) == (
        "library" if fits else "gemm_simt"
    )
    assert clock.asked == (0 if fits else 1)
    assert run(tuned(contest, given=f"{contest[1]} float32 nt 15x7x15: library addmm")) == "library"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_programs_of_a_region_have_names_of_their_own(contest: Any, arch: str) -> None:
    ((_, found),) = candidates(contest[0], chip_for(arch), library=True, tensor_maps=True).items()
    titles = [title(p) for p in found]
    assert len(set(titles)) == len(titles) > 4 and {"library mm", "library addmm"} <= set(titles)


def test_text_that_names_no_program_is_an_error(contest: Any) -> None:
    built = tuned(contest, given=f"{contest[1]} float32 nt 12x4x8: gemm_simt 7x7")
    for _ in range(2):
        with pytest.raises(InvalidSetting, match=r"12x4x8: gemm_simt 7x7'; the programs .*'gemm_simt.*'library addmm'"):
            built(X, W, B)


def test_what_is_remembered_is_listed(contest: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(autotune, "Cache", partial(Cache, root=tmp_path / "cache"))
    assert remembered() == {}
    monkeypatch.setattr(autotune, "_times", Clock(2.0, 1.0))
    run(tuned(contest))
    monkeypatch.setattr(autotune.driver, "version", lambda: 2)
    monkeypatch.setattr(autotune, "_times", Clock(1.0, 2.0))
    time.sleep(0.01)  # so that it is later
    run(tuned(contest))
    ((device, (choice,)),) = remembered().items()
    assert device == str(tmp_path) and str(choice).startswith(f"{contest[1]} float32 nt 12x4x8: gemm_simt")


def test_the_setting_reaches_the_kernels(contest: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A program that the cost model does not prefer, through the door, in the simulator."""

    def call(**settings: str) -> str:
        torch._dynamo.reset()
        options = {"simulate": True, "arch": "sm_80", **settings}
        compiled = torch.compile(lambda x, w, b: (x @ w.t() + b).relu(), backend="fusewright", options=options)
        torch.testing.assert_close(compiled(X, W, B), (X @ W.t() + B).relu())
        return "".join(r.getMessage() for r in caplog.records if "setting `tuned`" in r.getMessage())

    with caplog.at_level(logging.INFO, logger="fusewright"):
        assert call() == ""
        *_, last = candidates(contest[0], CHIP, library=False)[contest[1]]
        line = f"{contest[1]} float32 nt 12x4x8: {title(last)}"
        assert line in call(tuned=line)
