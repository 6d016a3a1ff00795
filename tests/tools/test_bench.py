"""`bench`: matched precision, honest ratios, the floor, and what goes wrong. Without a GPU, its clock is the host's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusewright.errors import EagerFailure, ModelFileError, OutputNotWritable, ToolMissing, UnknownSetting
from fusewright.tools import bench as tool
from fusewright.tools import bench_show as show
from fusewright.tools import timing
from fusewright.tools.bench import Bench, Mode, Request, Timed, bench
from fusewright.tools.first_call import FirstCall, Job, first_call
from model_files import model

LINEAR = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(32, 48)

    def forward(self, x):
        return F.leaky_relu(self.gemm(x) * 2.0, 0.1)
"""
TEXT = model(LINEAR, inputs="torch.randn(rows, 32)", before="rows = 64\n\n\n")
RATES = {"copy_bytes_per_s": 4e12, "fp16_flop_per_s": 8e14}
ENVIRONMENT = {"device": "A GPU", "versions": {}, "card": {}}

Measure = Callable[..., Bench]


class HostEvent:
    """torch.cuda.Event, by the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def host_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)


@pytest.fixture
def measure(host_clock: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measure:
    """Runs `bench` on TEXT, or another model, as if there were a GPU."""
    monkeypatch.setattr(tool, "require_gpu", lambda: None)
    monkeypatch.setattr(timing, "rates", lambda: RATES)
    monkeypatch.setattr(timing, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(tool, "baselines", lambda quick, graphs: {"eager": None, "torch.compile": {"backend": "eager"}})
    monkeypatch.setattr(tool, "ours", lambda graphs: {"backend": "aot_eager"})
    torch._dynamo.reset()

    def run(candidate: str | None = None, text: str = TEXT, **options: Any) -> Bench:
        (tmp_path / "model.py").write_text(text)
        if candidate is not None:
            (tmp_path / "new.py").write_text(candidate.replace("class Model(", "class ModelNew("))
        request = Request(tmp_path / "model.py", None if candidate is None else tmp_path / "new.py", trials=10)
        return bench(replace(request, **options), Console(quiet=True))

    return run


def test_three_modes_of_every_candidate(measure: Measure) -> None:
    found = measure()
    assert list(found.modes) == ["forward", "backward", "both"] and found.candidate == "fusewright"
    for mode in found.modes.values():
        assert list(mode.timings) == ["eager", "torch.compile", "fusewright"]
        for timed in mode.timings.values():
            assert timed.ms and timed.low and timed.high and timed.low <= timed.ms <= timed.high
            assert timed.trials == 10 and timed.failed is None
            assert timed.of_floor == pytest.approx(mode.floor_ms / timed.ms)
        assert mode.best_baseline in ("eager", "torch.compile")
        best, own = mode.timings[mode.best_baseline].ms, mode.timings["fusewright"].ms
        assert best and own and mode.speedup == pytest.approx(best / own)
    assert set(found.accuracy) == {"torch.compile", "fusewright"}
    assert not any(a.problems for a in found.accuracy.values())
    assert found.inputs == "float32 [64, 32]" and not found.tf32


def test_the_floor(measure: Measure) -> None:
    """Each input, parameter and result once; float32 counts as three fp16 products, TF32 and fp16 as one."""
    x, w, b, y = 64 * 32, 32 * 48, 48, 64 * 48
    product = 2 * 64 * 32 * 48
    exact = measure().modes
    assert exact["forward"].bytes == 4 * (x + w + b + y) and exact["forward"].flop == product
    assert exact["backward"].bytes == 4 * (2 * (x + w) + b + y) and exact["backward"].flop == 2 * product
    assert exact["both"].bytes == exact["forward"].bytes + exact["backward"].bytes
    assert exact["forward"].floor_ms == pytest.approx(1e3 * exact["forward"].bytes / 4e12)
    slow = dict(RATES, copy_bytes_per_s=1e30)
    for options, passes in (({}, 3), ({"tf32": True}, 1), ({"dtype": torch.float16}, 1)):
        timing.rates = lambda: slow
        found = measure(modes=("forward",), **options).modes["forward"]
        assert found.floor_ms == pytest.approx(1e3 * passes * product / 8e14)


def test_settings_and_modes(measure: Measure) -> None:
    found = measure(settings={"rows": 16}, modes=("both", "forward"), dtype=torch.bfloat16)
    assert found.inputs == "bfloat16 [16, 32]" and found.dtype == "bfloat16"
    assert list(found.modes) == ["forward", "both"]
    with pytest.raises(UnknownSetting, match=r"'sideways'.*forward, backward, both"):
        measure(modes=("sideways",))


# ---- matched precision


def test_a_less_accurate_candidate_gets_no_ratio(measure: Measure) -> None:
    found = measure(TEXT.replace("self.gemm(x)", "self.gemm(x.bfloat16().float())"), modes=("forward",))
    (candidate,) = [name for name in found.modes["forward"].timings if name.endswith("new.py")]
    assert found.candidate == candidate
    assert found.modes["forward"].timings[candidate].ms and found.modes["forward"].speedup is None
    assert found.accuracy[candidate].problems and (found.accuracy[candidate].ratio or 0) > 100
    assert f"{candidate} is not at the same precision" in text(found)


def test_all_run_at_the_same_flags_whatever_a_file_switches(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    switching = TEXT.replace("rows = 64\n", "rows = 64\ntorch.set_float32_matmul_precision('high')\n")
    spy = (
        "        import builtins\n        builtins.seen.append(torch.get_float32_matmul_precision())\n        return F"
    )
    seen: list[str] = []
    monkeypatch.setattr("builtins.seen", seen, raising=False)
    before = torch.get_float32_matmul_precision()
    measure(switching.replace("        return F", spy), text=switching, modes=("forward",))
    assert set(seen) == {"highest"}
    seen.clear()
    measure(TEXT.replace("        return F", spy), modes=("forward",), tf32=True)
    assert set(seen) == {"high"} and torch.get_float32_matmul_precision() == before


def test_a_candidate_that_switches_flags_is_out(measure: Measure) -> None:
    line = "        torch.set_float32_matmul_precision('high')\n        return F"
    found = measure(TEXT.replace("        return F", line), modes=("forward",))
    timings = found.modes["forward"].timings
    assert "switches" in (timings[found.candidate].failed or "") and timings[found.candidate].ms is None
    assert timings["eager"].ms and found.modes["forward"].speedup is None


# ---- what fails


def test_a_candidate_takes_the_settings_too(measure: Measure) -> None:
    wide = TEXT.replace("rows = 64", "width = 48").replace("32, 48", "32, width").replace("rows, 32", "64, 32")
    candidate = wide.replace("return F", "assert width == 16\n        return F")
    found = measure(candidate, text=wide, modes=("forward",), settings={"width": 16})
    assert found.modes["forward"].timings[found.candidate].failed is None


def test_a_copy_of_the_model_is_no_candidate(measure: Measure) -> None:
    with pytest.raises(ModelFileError, match="no class ModelNew"):
        measure(TEXT.replace("class Model(", "class Model ("))


def test_a_candidate_that_raises_is_a_row(measure: Measure) -> None:
    found = measure(TEXT.replace("return F", "raise ValueError('of its own')\n        return F"))
    for mode in found.modes.values():
        assert mode.timings[found.candidate].failed == "ValueError: of its own"
        assert mode.best_baseline and mode.speedup is None
    assert "failed" in text(found) and "of its own" in text(found)


def test_the_reference_must_run(measure: Measure) -> None:
    with pytest.raises(EagerFailure, match="of its own"):
        measure(text=TEXT.replace("return F", "raise ValueError('of its own')\n        return F"))


def test_without_a_backward(measure: Measure) -> None:
    blind = TEXT.replace("return F.leaky_relu(self.gemm(x) * 2.0, 0.1)", "return self.gemm(x) > 0")
    found = measure(text=blind)
    assert list(found.modes) == ["forward"] and any("backward" in reason for reason in found.not_measured)
    with pytest.raises(EagerFailure, match="no backward to measure"):
        measure(text=blind, modes=("backward",))


def test_random_models_are_timed_but_not_compared(measure: Measure) -> None:
    found = measure(text=TEXT.replace("return F.", "return F.dropout(x[:, :1]) * F."), modes=("forward",))
    assert found.accuracy == {} and found.modes["forward"].speedup
    assert any("random seed" in reason for reason in found.not_measured)


def test_faster_than_possible_is_said(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "rates", lambda: {"copy_bytes_per_s": 1e3, "fp16_flop_per_s": 1e3})
    assert "faster than is possible" in text(measure(modes=("forward",)))


def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ToolMissing, match=r"NVIDIA GPU.*fusewright doctor"):
        bench(Request(tmp_path / "model.py"), Console(quiet=True))


# ---- timing


def test_candidates_take_turns_and_are_prepared(host_clock: None) -> None:
    calls: list[str] = []
    candidates = {
        name: timing.Candidate(lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}"))
        for name in ("a", "b", "c")
    }
    found = timing.interleaved(candidates, trials=5 * timing.IN_A_ROW)
    assert set(found) == {"a", "b", "c"} and all(f["trials"] == 5 * timing.IN_A_ROW for f in found.values())
    warm_ups = [c for name in "abc" for c in (f"prepare {name}", name) * timing.WARM_UPS]
    assert calls[: len(warm_ups)] == warm_ups and timing.WARM_UPS >= 10 and timing.TRIALS >= 50
    trials = calls[len(warm_ups) :]
    assert trials[::2] == [f"prepare {name}" for name in trials[1::2]]
    ran = trials[1::2]
    turns, left = [], timing.IN_A_ROW + 1  # a call that is not timed goes before
    for start in range(0, len(ran), left):
        assert len(set(ran[start : start + left])) == 1
        turns.append(ran[start])
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


# ---- first calls


def test_a_first_call_is_two_new_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds what the first left in the caches; neither sees what lies in the current folder."""
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    head = f"""import os, pathlib
folder = pathlib.Path(os.environ["FUSEWRIGHT_CACHE_DIR"])
with open({str(log)!r}, "a") as log:
    print(os.getpid(), folder.exists(), folder, file=log)
folder.mkdir(exist_ok=True)
sizes = (8, 32)
"""
    (tmp_path / "model.py").write_text(model(LINEAR, inputs="torch.randn(sizes)", before=head))
    path, settings = str(tmp_path / "model.py"), {"sizes": (16, 32)}
    done = first_call(Job(path, False, path, settings, "bfloat16", False, None, True))
    assert done.failed is None and done.cold_s and done.warm_s
    first, _, third, fourth = (line.split() for line in log.read_text().splitlines())
    assert [first[1], third[1]] == ["False", "True"] and first[2] == third[2] == fourth[2]
    assert first[0] != third[0] == fourth[0] and not Path(first[2]).exists()


def test_a_first_call_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    job = Job("a", False, "a", {}, None, False, None, True)
    assert first_call(job).failed == "exit code 1, and no time"
    monkeypatch.setattr("sys.executable", "/bin/true")  # as of a file that ends the process by os._exit
    assert first_call(job).failed == "exit code 0, and no time"


def test_first_calls_of_all(measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs: list[Job] = []

    def fake(job: Job) -> FirstCall:
        jobs.append(job)
        return FirstCall(failed="of its own") if job.compiled else FirstCall(2.0, 1.0)

    monkeypatch.setattr(tool, "first_call", fake)
    found = measure(TEXT, modes=("forward",), first_call=True, settings={"rows": 8}, dtype=torch.float16)
    assert list(found.first_call) == ["eager", "torch.compile", found.candidate]
    assert {j.inputs for j in jobs} == {str(tmp_path / "model.py")} and {j.dtype for j in jobs} == {"float16"}
    assert jobs[2].path == str(tmp_path / "new.py") and not any(j.backward for j in jobs)
    shown = text(found)
    assert "2.00 s" in shown and "1.00 s" in shown and "of its own" in shown


# ---- what is shown


def text(found: Bench) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show.render(found))
    return console.export_text()


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timings = {
        "eager": Timed(2.0, 1.9, 2.1, 50, 0.1),
        "fusewright": Timed(1.0, 0.9, 1.1, 50, 0.2),
        "x": Timed(failed="no"),
    }
    mode = Mode(0.2, 10**8, 10**11, 10**6, timings, "eager", 2.0)
    products = replace(mode, flop=0)
    found = Bench(
        "m.py", "fusewright", "", "", False, False, ENVIRONMENT, RATES, {"forward": mode, "both": products}, {}, {}, []
    )
    for suffix, start in {".png": b"PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}.items():
        path = tmp_path / f"roof line{suffix}"
        show.require_plot(path)
        show.plot(found, path)
        assert start in path.read_bytes()[:200]


def test_plot_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputNotWritable, match=r"\.png, \.svg, \.pdf"):
        show.require_plot(tmp_path / "picture.doc")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ToolMissing, match="pip install matplotlib"):
        show.require_plot(tmp_path / "picture.png")


# ---- on a GPU


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """The whole way with real clocks: fusewright in process, at sizes that take no time to compile."""
    torch._dynamo.reset()
    (tmp_path / "model.py").write_text(TEXT.replace("Linear(32, 48)", "Linear(1024, 512)").replace(", 32)", ", 1024)"))
    for graphs in (False, True):
        request = Request(tmp_path / "model.py", quick=True, trials=12, settings={"rows": 512}, cuda_graphs=graphs)
        found = bench(request, Console(quiet=True))
        assert not found.accuracy["fusewright"].problems
        assert found.modes["backward"].flop == 2 * found.modes["forward"].flop == 4 * 512 * 1024 * 512
        for mode in found.modes.values():
            failures = {name: t.failed for name, t in mode.timings.items() if t.failed}
            assert not failures
            assert mode.speedup and all(t.of_floor and 0 < t.of_floor < 1 for t in mode.timings.values())
        assert 1e11 < found.rates["copy_bytes_per_s"] < 1e14 and 1e12 < found.rates["fp16_flop_per_s"] < 1e16
        assert found.environment["device"] in " ".join(text(found).split())


@pytest.mark.gpu
def test_first_calls_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(tool, "baselines", lambda quick, graphs: {"eager": None})
    (tmp_path / "model.py").write_text(TEXT)
    found = bench(Request(tmp_path / "model.py", quick=True, trials=10, first_call=True), Console(quiet=True))
    for name, first in found.first_call.items():
        assert first.failed is None, f"{name}: {first.failed}"
        assert first.cold_s and first.warm_s
    ours = found.first_call["fusewright"]
    assert ours.cold_s and ours.warm_s and ours.warm_s < ours.cold_s
    json.dumps(found.environment)
