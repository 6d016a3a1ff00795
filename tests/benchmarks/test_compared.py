"""The programs that compare many models, where they need no GPU: what they draw, train, sum up and call a success."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import common
import epilogues
import headline
import measure
import run
import sweep
import tower
import training
import zoo
from common import Budget, Subject, compiling_only, geometric_mean, measured_in_turn
from fusewright.fusion.plan import Encode, Region
from products import EIGHT, PRECISIONS, STEPS, Product, flags, made


def timing(ms: float) -> dict[str, Any]:
    return {"ms": ms, "low": ms, "high": ms, "trials": 10}


def test_draws_are_as_the_text_says_and_repeat_by_seed() -> None:
    cases = [case for seed in range(50) for case in sweep.draw(seed, 40)]
    assert sweep.draw(3, 40) == sweep.draw(3, 40) != sweep.draw(4, 40)
    for sizes, ragged in (([c.m for c in cases], 0.22), ([c.n for c in cases], 0.22), ([c.k for c in cases], 0.0)):
        assert min(sizes) == 512 and 8000 < max(sizes) <= 8192
        assert sum(s < 2048 for s in sizes) / len(sizes) == pytest.approx(0.5, abs=0.04)
        assert sum(bool(s % 8) for s in sizes) / len(sizes) == pytest.approx(ragged, abs=0.03)
    assert {name for c in cases for name in c.steps} == {"bias", *STEPS}
    assert {c.steps == () for c in cases} == {True, False}


def test_a_sweep_is_summed_up_by_precision() -> None:
    def case(ratio: float | None) -> dict[str, Any]:
        found: dict[str, Any] = {"failed": "why"}
        if ratio is not None:
            found = {"speedup": ratio, "device_speedup": ratio * 2, "error_over_inductor": ratio / 2}
        return {"results": {"float32": found}}

    found = sweep.summary([case(2.0), case(8.0), case(None)], ["float32", "bfloat16"])
    assert found.keys() == {"float32"}
    assert found["float32"]["geometric_mean"] == pytest.approx(4.0) and found["float32"]["target"] == 3.5
    assert found["float32"]["device"] == pytest.approx(8.0)
    assert (found["float32"]["cases"], found["float32"]["failed"]) == (2, 1)
    assert (found["float32"]["least"], found["float32"]["error_over_inductor"]) == (2.0, 4.0)
    assert sweep.TARGETS.keys() == PRECISIONS.keys()
    assert math.isnan(geometric_mean([]))


def test_the_kernel_of_the_product_is_named() -> None:
    """Not what splits its operands beforehand."""
    encode = SimpleNamespace(region=Encode("halves", (), ()), family="split", variant="")
    columns = SimpleNamespace(region=Region("rest", (), 8, (), ()), family="pointwise", variant="")
    gemm = Region("product", (), 8, (), (), gemm=object())  # type: ignore[arg-type]
    product = SimpleNamespace(region=gemm, family="gemm_sm90", variant="128×128×64")
    programs = dict(enumerate((encode, columns, product)))
    assert sweep._program([SimpleNamespace(programs=programs)]) == {"family": "gemm_sm90", "tile": "128×128×64"}
    assert sweep._program([SimpleNamespace(programs={0: columns})]) == {}


def test_precisions_set_torchs_flags_inside_only() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    for precision in PRECISIONS.values():
        with flags(precision.tf32):
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is precision.tf32
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("steps", EIGHT, ids=", ".join)
def test_each_epilogue_changes_the_product(steps: tuple[str, ...]) -> None:
    model, (x, tile) = made(24, 16, 32, steps, torch.float32, "cpu")
    bare = x @ model.linear.weight.T
    assert isinstance(model, Product) and not torch.allclose(model(x, tile), bare)
    assert (model.linear.bias is not None) is (steps == ("bias",))


def test_costs_are_over_the_bare_product() -> None:
    found = epilogues.summary({"nothing": timing(2.0), "bias": timing(2.05), "ReLU": {"failed": "why"}})
    assert found["costs"] == {"bias": pytest.approx(0.025)} and found["worst"] == found["costs"]["bias"]
    assert found["limit"] == 0.03


def test_a_speedup_is_over_the_best_baseline() -> None:
    timed = {"eager": timing(3.0), "inductor": timing(2.0), zoo.OURS: timing(1.0), zoo.AUTOTUNE: {"failed": ""}}
    timed |= {"inductor reduce-overhead": timing(1.5), zoo.REPLAYED: timing(0.5)}
    assert zoo.speedup(timed, zoo.OURS) == {"best": "inductor", "speedup": 2.0}
    assert zoo.speedup(timed, zoo.REPLAYED) == {"best": "inductor reduce-overhead", "speedup": 3.0}
    assert zoo.speedup({"eager": timing(3.0), zoo.OURS: {"failed": "why"}}, zoo.OURS) == {}
    alone = timed | {zoo.OURS: timing(0.5)}
    compared = zoo.comparisons("bfloat16", {"modes": {"forward": {"timings": timed, "device": alone}}})
    modes = {name: found["modes"]["forward"] for name, found in compared.items()}
    assert {n: (m["speedup"], m["device_speedup"]) for n, m in modes.items()} == {
        "bfloat16": (2.0, 4.0),
        "bfloat16, CUDA graphs": (3.0, 3.0),
    }
    modes = {"forward": {"speedup": 2.0, "device_speedup": 3.0}, "forward+backward": {"speedup": 4.5}}
    found = zoo.summary({"one": {"float32": {"modes": modes}}})
    assert found.keys() == {"float32"} and found["float32"]["geometric_mean"] == pytest.approx(3.0)
    assert found["float32"]["worst"] == ["one, forward", 2.0] and found["float32"]["target"] == 3.0
    assert found["float32"]["device"] == {"geometric_mean": pytest.approx(3.0), "worst": ["one, forward", 3.0]}
    assert tower.ratio({tower.OURS: timing(0.75), tower.THEIRS: timing(1.0)}) == {"over_reduce_overhead": 0.75}
    assert tower.ratio({tower.OURS: {"failed": "why"}, tower.THEIRS: timing(1.0)}) == {}


def test_a_subject_gives_every_gradient_and_leaves_the_model() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 3), [torch.randn(4, 5)]
    subject = Subject(model, inputs).training()
    found = subject.results()
    assert found.keys() == {"output", "gradient of input", "gradient of weight", "gradient of bias"}
    assert torch.allclose(found["gradient of weight"], subject.gradient.T @ inputs[0], atol=1e-6)
    assert model.weight.grad is None and inputs[0].grad is None
    wrong = Subject(copy.deepcopy(model), inputs).training()
    with torch.no_grad():
        wrong.model.bias.add_(0.01)
    found = common.errors({"right": Subject(model, inputs).training(), "wrong": wrong}, subject)
    assert found["right"]["problems"] == [] and found["wrong"]["problems"]


def test_the_oracle_has_the_gradient_that_the_others_have() -> None:
    subject = Subject(nn.Linear(5, 3).bfloat16(), [torch.randn(4, 5).bfloat16()]).training()
    exact = subject.exact()
    assert exact.gradient.dtype == torch.float64 and torch.equal(exact.gradient, subject.gradient.double())
    assert torch.equal(exact.inputs[0], subject.inputs[0].double()) and exact.model.weight.dtype == torch.float64


def test_backward_alone_is_what_both_do() -> None:
    model, inputs = measure.Headline(5, 3), [torch.randn(4, 5)]
    subject = headline.Subject(model, inputs).training(torch.randn(4, 3))
    expected = subject.results()
    assert expected.keys() == {"output", "gradient of x", "gradient of gemm.weight", "gradient of gemm.bias"}
    candidate = subject.candidate("backward")
    for _ in range(2):  # nothing accumulates
        candidate.prepare()
        candidate.run()
    assert torch.equal(subject.model.gemm.weight.grad, expected["gradient of gemm.weight"])
    assert headline._ratios(*[headline._errors(expected, subject.exact().results())] * 2)["output"]["median"] <= 1


def test_compiling_only_runs_nothing() -> None:
    compiled = {"backend": "fusewright", "options": {"simulate": True, "arch": "sm_80"}}
    with measure.recorded() as built, compiling_only():
        Subject(nn.ReLU(), [torch.randn(8, 8)], compiled).forward()
        pytest.fail("the call returned")
    assert len(built) == 1 and built[0].loaded
    torch._dynamo.reset()


def _prepare(task: str) -> Callable[[], str]:
    if task == "fails":
        raise ValueError("cannot be prepared")
    if task == "slow":
        time.sleep(600)
    prepared = time.monotonic()

    def run() -> str:
        if task == "ends":
            os._exit(1)
        return f"{task} {prepared} {time.monotonic()}"

    return run


def test_all_is_prepared_before_anything_is_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WORKERS", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    tasks = ["a", "fails", "ends", "b", "c", "after the end"]
    found = dict(measured_in_turn(_prepare, tasks, Budget(120), 0.9))
    assert list(found) == tasks
    assert "cannot be prepared" in found["fails"]["failed"]
    assert found["ends"] == found["after the end"] == {"failed": "its process ended"}
    names, prepared, measured = zip(*(found[t].split() for t in ("a", "b", "c")), strict=True)
    assert names == ("a", "b", "c") and max(map(float, prepared)) < min(map(float, measured))
    assert list(map(float, measured)) == sorted(map(float, measured))


def _ticking(task: Path) -> Callable[[], float]:
    """Writes while its process runs; what is measured is how much another one writes in the meantime."""
    (task / f"{os.getpid()}").touch()

    def tick() -> None:
        while True:
            with (task / f"{os.getpid()}").open("a") as file:
                file.write("tick")
            time.sleep(0.01)

    def written() -> int:
        return sum(file.stat().st_size for file in task.iterdir() if file.name != str(os.getpid()))

    threading.Thread(target=tick, daemon=True).start()

    def run() -> float:
        time.sleep(0.5)  # a busy machine stops a process late
        before = written()
        time.sleep(0.5)
        return written() - before

    return run


def test_while_one_worker_measures_the_others_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WORKERS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = [ticks for _, ticks in measured_in_turn(_ticking, [tmp_path, tmp_path], Budget(120), 0.9)]
    assert found == [0, 0] and all(file.stat().st_size for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


def _waiting(task: Path) -> Callable[[], None]:
    (task / f"{os.getpid()}").touch()
    return lambda: time.sleep(600)


def _measure(task: Path) -> None:
    list(measured_in_turn(_waiting, [task, task], Budget(600), 0.9))


def test_stopped_workers_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    parent = multiprocessing.get_context("fork").Process(target=_measure, args=(tmp_path,))
    parent.start()
    try:
        _until(lambda: len(list(tmp_path.iterdir())) == 2)
        time.sleep(1.0)  # one is stopped
    finally:
        parent.kill()
    parent.join()
    _until(lambda: not any(Path(f"/proc/{worker.name}").exists() for worker in tmp_path.iterdir()))


def _until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_budget_ends_preparation_and_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LATE", 0.1)
    assert dict(measured_in_turn(_prepare, ["slow"], Budget(2), 0.5)) == {"slow": {"failed": "it took too long"}}
    assert all("failed" in found for _, found in measured_in_turn(_prepare, ["a"], Budget(0), 1.0))


def test_curves_within_the_spread_pass() -> None:
    r = random.Random(0)

    def curve(offset: float) -> list[float]:
        return [offset + math.exp(-i / 50) + 0.001 * r.random() for i in range(100)]

    eager = [curve(0.0), curve(0.01), curve(-0.01)]
    inside, outside = training.verdict(curve(0.005), eager), training.verdict(curve(0.05), eager)
    assert inside["passed"] and inside["distance"] < inside["spread"] == pytest.approx(0.02, abs=2e-3)
    assert not outside["passed"] and outside["distance"] == pytest.approx(0.04, abs=2e-3)
    flat = [1.0] * 100
    assert not training.verdict(flat, [flat, flat])["passed"], "nothing was learnt"


@pytest.mark.parametrize("optimiser", training.OPTIMISERS)
def test_the_classifier_learns_whatever_the_order(optimiser: str) -> None:
    data = training.Data.of_teacher(512, 16, 4, "cpu")
    torch.manual_seed(0)
    initial, curves = training.Classifier(16, 32, 4), []
    for order in (0, 0, 1):
        model = copy.deepcopy(initial)
        training.nudge(model, order)
        batches = data.batches(64, 20, order)
        curves.append(training.train(model, model, training.OPTIMISERS[optimiser], batches))
    same, again, other = curves
    assert same == again and training.distance(same, other) < 1e-3 and same[-1] < same[0]


def test_another_order_is_of_the_same_rows() -> None:
    data = training.Data.of_teacher(512, 16, 4, "cpu")
    for (x, labels), (y, others) in zip(*(data.batches(64, 3, order) for order in (0, 1)), strict=True):
        assert not torch.equal(x, y) and torch.equal(x.sort(0).values, y.sort(0).values)
        assert torch.equal(labels.sort().values, others.sort().values)


def test_a_nudge_is_one_ulp() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(40, 30).to(dtype)
        before = model.weight.detach().clone()
        training.nudge(model, 1)
        moved = ((model.weight - before).abs() / before.abs()).detach()
        assert float(moved.max()) <= torch.finfo(dtype).eps * 1.01
        assert 0.25 < float((moved == 0).float().mean()) < 0.42
        before = model.weight.detach().clone()
        training.nudge(model, 0)
        assert torch.equal(model.weight, before)


def test_budgeted_steps_are_told_their_time(tmp_path: Path) -> None:
    steps = {s.name: s for s in run.STEPS}
    assert {"sweep", "epilogues", "zoo", "tower", "training"} <= steps.keys()
    arguments = steps["sweep"].arguments(True, 100.0)
    assert arguments[-3:] == ["--quick", "--seconds", "80"]
    assert "--seconds" not in steps["gemm_simt"].arguments(False, 50)
    told = run.Step("told", ("/bin/sh", "-c", 'echo "$@"', "told"), 60, budgeted=True)
    outcome = run.perform(told, False, 50, tmp_path / "log.txt")
    assert (outcome.verdict, outcome.last) == ("passed", "--seconds 30")
    assert run.perform(told, False, run.LEAST_SECONDS - 1, tmp_path / "log.txt").verdict == "no time left"


def test_results_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    path = measure.write("sweep", {"summary": sweep.summary([], ["float32"]), "seed": 1})
    assert json.loads(path.read_text())["seed"] == 1


def test_ours_with_cuda_graphs_is_beside_all_and_ours_without_beside_those_without() -> None:
    theirs, ours = common.GRAPHS
    times = {"eager": 4.0, "inductor": 3.0, theirs: 2.0, "fusewright": 2.0, ours: 1.0}
    timed = {**{name: {"ms": ms} for name, ms in times.items()}, "frozen": {"failed": "why"}}
    assert common.times_faster(timed, ("fusewright", "frozen", ours)) == {"fusewright": 1.5, ours: 2.0}


def test_the_floor_of_a_float32_product_has_its_fp16_products_and_the_bytes_of_splitting() -> None:
    rates = {"fp16_flop_per_s": 2e12, "copy_bytes_per_s": 1e9}
    both, kept = (sweep.floor_ms(1000, 2000, 500, sweep.PRECISIONS[n], rates) for n in ("float32", "TF32, frozen"))
    assert both == pytest.approx(3 * 1.0 + 1.5e6 * 8 / 1e9 * 1e3) and kept == pytest.approx(1.0 + 0.5e6 * 6 / 1e9 * 1e3)
