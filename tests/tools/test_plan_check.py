"""The check without a GPU finds what is wrong: in the plan, in the kernels, in one gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fusewright.tools.optimize
from fusewright.capture.model_file import load
from fusewright.chip import chip_for
from fusewright.fusion import reference
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget
from fusewright.tools import plan_check
from fusewright.tools.plan_check import PlanCheck, check
from fusewright.tools.small import Small, small
from model_files import MODELS, varied, written

CHIP = chip_for("sm_80")


RIGHT = ("several inputs", "buffers", "tuple", "twice", "two linears", "integers", "variadic", "flattened", "residual")


def checked(name: str, *, simulate: bool = False) -> PlanCheck:
    return check(small(varied(name).file, {}, None), CHIP, (), schedules=int(simulate))


@pytest.mark.parametrize("name", RIGHT)
def test_right_plans(name: str) -> None:
    outcome = checked(name)
    assert outcome.plan.passed and outcome.plan.worst <= plan_check.PLAN_TOLERANCE and outcome.plan.checked > 0
    assert outcome.kernels is None


def test_right_kernels() -> None:
    """Two results, the first without a gradient; float16 beside eager's own error."""
    outcome = checked("indices first", simulate=True)
    assert outcome.kernels is not None and outcome.kernels.passed and outcome.kernels.worst <= plan_check.RATIO
    assert outcome.kernels.checked == 7  # two results, in inference and training, and three gradients


Change = Callable[[list[Any]], list[Any]]


def _worsen(index: int, factor: float) -> Change:
    def change(results: list[Any]) -> list[Any]:
        return [r * factor if i == index and isinstance(r, torch.Tensor) else r for i, r in enumerate(results)]

    return change


@pytest.mark.parametrize(
    "graph, change, where",
    [
        (0, _worsen(0, 1 + 1e-9), "result 0"),
        (0, _worsen(0, 0.0), "result 0"),
        (0, _worsen(0, float("nan")), "result 0"),
        (0, lambda results: [r[:-1] for r in results], "result 0"),
        (1, _worsen(0, -1.0), "result 0 in training"),
        (2, _worsen(0, 0.5), "gradient of self.gemm.weight"),
        (2, _worsen(1, 2.0), "gradient of self.gemm.bias"),
    ],
)
def test_wrong_plans(graph: int, change: Change, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph's results are changed on their way."""
    plans: list[Any] = []
    run = reference.run

    def wrong(plan: Any, arguments: Any, *, widen: bool) -> list[Any]:
        if plan not in plans:
            plans.append(plan)
        results = run(plan, arguments, widen=widen)
        return change(results) if plans.index(plan) == graph else results

    monkeypatch.setattr(plan_check.reference, "run", wrong)
    outcome = checked("one in a list").plan
    assert not outcome.passed and outcome.where == where


def test_a_kernel_is_held_against_eager() -> None:
    """Half of what eager has of precision is too little."""
    oracle = {"result 0": torch.linspace(1, 2, 64, dtype=torch.float64)}
    eager = {"result 0": oracle["result 0"].float()}
    assert plan_check._judge(oracle, eager, eager).passed
    low = oracle["result 0"].half()
    for wrong in (low, low.float()):
        assert not plan_check._judge(oracle, {"result 0": wrong}, eager).passed
    assert not plan_check._judge(oracle, {}, eager).passed


@pytest.mark.parametrize("distance", [plan_check._distance, plan_check._bulk])
def test_what_is_not_finite_is_held_to_its_class(distance: Any) -> None:
    """NaN, Inf and −Inf where eager or the oracle has them; the other elements by their distance."""
    inf, nan = math.inf, math.nan
    oracle = torch.tensor([nan, inf, -inf, 1e40, 1.0, 2.0, 3.0], dtype=torch.float64)  # the fourth is Inf in float32

    def passed(*values: float) -> bool:
        eager = {"result 0": oracle.float()}
        found = {"result 0": torch.tensor(values)}
        return plan_check._judge({"result 0": oracle}, found, eager, 1, distance).passed

    assert passed(nan, inf, -inf, inf, 1, 2, 3)
    for wrong in ((1, inf, -inf, inf, 1, 2, 3), (nan, -inf, -inf, inf, 1, 2, 3), (nan, inf, -inf, inf, nan, 2, 3)):
        assert not passed(*wrong)
    assert not passed(nan, inf, -inf, inf, 1.001, 2.002, 3.003)


def test_inputs_of_any_structure_and_layout() -> None:
    """A list and a number in a dict, a transposed tensor; results that are NaN and Inf where eager's are."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gemm = torch.nn.Linear(20, 16)

        def forward(self, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.gemm(given["pair"][0]) * given["factor"]
            return torch.log(y), given["pair"][1] / 0.0

    inputs = [{"pair": [torch.rand(20, 24).t(), torch.rand(24, 8)], "factor": 2}]
    outcome = check(Small(Model(), inputs, "small"), CHIP, (), schedules=1)
    assert outcome.plan.passed and outcome.kernels is not None and outcome.kernels.passed


@pytest.mark.parametrize(
    "returned",
    ["self.l(x).t()", "torch.relu(x).t() * 2", "x.bfloat16().exp()", "x.half().exp().float()", "(x.exp(), x.half())"],
)
def test_layouts_of_gradients_and_the_models_own_casts(returned: str, tmp_path: Path) -> None:
    """A result may be transposed, and its gradient then too; what the model rounds itself, the oracle does not."""
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\nclass Model(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.l = torch.nn.Linear(16, 24)\n    def forward(self, x):\n        return "
        f"{returned}\ndef get_inputs():\n    return [torch.randn(8, 16)]\ndef get_init_inputs():\n    return []\n"
    )
    outcome = check(small(load(path), {}, None), CHIP, (), schedules=1)
    assert outcome.plan.passed and outcome.kernels is not None and outcome.kernels.passed, outcome


def test_where_tf32_is_allowed_eager_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's eager does. Masks flip in both; what is wrong by more than that is still seen."""
    monkeypatch.setattr(fusewright.tools.optimize, "tf32_allowed", lambda: True)
    shipped = written(MODELS["float32 halves"]).emitted.planned
    outcome = check(reduced(), chip_for("sm_90a"), shipped, schedules=1).kernels
    assert outcome is not None and outcome.passed and outcome.worst > 0.5
    call = Executable.__call__

    def worse(self: Executable, *arguments: Any) -> list[Any]:
        return [r * 1.001 if r is not None and r.is_floating_point() else r for r in call(self, *arguments)]

    monkeypatch.setattr(Executable, "__call__", worse)
    outcome = check(reduced(), chip_for("sm_90a"), shipped, schedules=1).kernels
    assert outcome is not None and not outcome.passed


def test_sizes_are_said() -> None:
    renamed = replace(small(varied("tabs").file, {}, None), sizes="these")
    assert check(renamed, CHIP, (), schedules=0).sizes == "these"


def test_what_is_simulated_is_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor cores' kernels, at sizes at which they would not be chosen."""
    if not SimulatorTarget(chip_for("sm_90a")).tensor_maps:
        pytest.skip("the simulator has no tensor maps")
    ran: set[str] = set()

    class Recorded(Executable):
        def __init__(self, plan: Any, programs: Any, *rest: Any) -> None:
            ran.update(p.family for p in programs.values() if p.region in plan.regions and p.region.gemm is not None)
            super().__init__(plan, programs, *rest)

    monkeypatch.setattr(plan_check, "Executable", Recorded)
    outcome = check(reduced(), chip_for("sm_90a"), varied("float32 halves").emitted.planned, schedules=1)
    assert ran == {"gemm_sm90"} and outcome.kernels is not None and outcome.kernels.passed


def test_where_no_halves_are_shipped_none_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats are read as they lie where lines run along K, and nothing is split for the other products either."""
    monkeypatch.setattr(fusewright.tools.optimize, "tf32_allowed", lambda: True)
    shipped = written(MODELS["float32 halves"]).emitted.planned[:1]
    assert shipped[0].plan.regions[0].gemm.tf32 and not shipped[0].plan.encodes, "no longer a test"  # type: ignore[union-attr]
    plans: list[Any] = []

    class Recorded(Executable):
        def __init__(self, plan: Any, *rest: Any) -> None:
            plans.append(plan)
            super().__init__(plan, *rest)

    monkeypatch.setattr(plan_check, "Executable", Recorded)
    outcome = check(reduced(), chip_for("sm_90a"), shipped, schedules=1)
    assert len(plans) == 3 and not any(p.encodes for p in plans)
    assert any(r.gemm and r.gemm.tf32 for p in plans for r in p.regions)
    assert outcome.kernels is not None and outcome.kernels.passed


def reduced() -> Small:
    """A Linear with an activation, ragged."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gemm = torch.nn.Linear(136, 72)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.leaky_relu(self.gemm(x) * 2.0, 0.1)

    return Small(Model(), [torch.rand(40, 136)], "small")


@pytest.mark.parametrize("depth", [64, 1000])
def test_the_floor_is_that_of_plain_sums(depth: int) -> None:
    """One chain of float32 is below it, by less than twice."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, depth, generator=generator), torch.randn(depth, 32, generator=generator)
    chain = torch.zeros(32, 32)
    for k in range(depth):
        chain = torch.addcmul(chain.double(), a[:, k, None].double(), b[k].double()).float()
    error = plan_check._distance(chain, a.double() @ b.double())
    assert error < plan_check._floor(torch.float32, depth) < 2 * error
    assert plan_check._floor(torch.float16, 1) == torch.finfo(torch.float16).eps / 2
