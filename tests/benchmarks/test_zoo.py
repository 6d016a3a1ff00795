"""The zoo's model files: no operator runs as ATen, and plans and kernels compute what the models do."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from fusewright.capture import model_file
from fusewright.capture.model import capture
from fusewright.capture.model_file import constants
from fusewright.chip import chip_for
from fusewright.tools.explain import Explanation, explain
from fusewright.tools.plan_check import check
from fusewright.tools.planned import plan_model
from fusewright.tools.small import Small

ZOO = Path(__file__).resolve().parents[2] / "benchmarks" / "zoo"
CHIP = chip_for("sm_90a")
SIZES = {"batch_size": 40, "in_features": 24, "features": 32, "hidden_features": 56, "out_features": 48}
# Kernels of a forward, what the fused ones replace, and the products in it, by model.
LAUNCHES = {
    "feed_forward": (3, 2, 2),
    "gated_mlp": (5, 3, 3),
    "gated_output": (8, 2, 2),
    "linear_clamp_gelu": (5, 1, 1),
    "linear_leaky_relu": (3, 1, 1),
    "linear_mish_residual": (4, 1, 1),
    "linear_swish_affine": (5, 1, 1),
    "mixture_of_activations": (12, 1, 1),
    "residual_mlp": (5, 2, 2),
    "squared_relu": (4, 2, 2),
    "tower": (10, 5, 5),
    "two_linears": (6, 2, 2),
}


@functools.cache
def reduced(name: str) -> Small:
    path = ZOO / f"{name}.py"
    known = constants(model_file.load(path).tree)
    file = model_file.load(path, {n: v for n, v in SIZES.items() if n in known})
    instance = file.instantiate(device="cpu")
    return Small(instance.model, instance.inputs, "small")


def explained(name: str) -> list[Explanation]:
    model = reduced(name)
    return [explain(p, p.sizes, CHIP) for p in plan_model(capture(model.model, model.inputs), CHIP, library=False)]


def test_every_file_is_listed() -> None:
    assert sorted(LAUNCHES) == sorted(p.stem for p in ZOO.glob("*.py"))


@pytest.mark.parametrize("name", LAUNCHES)
def test_fused_without_aten(name: str) -> None:
    inference, forward, backward = explained(name)
    assert [e.fallbacks for e in (inference, forward, backward)] == [[], [], []]
    before, after, products = LAUNCHES[name]
    assert (inference.launches_before, inference.launches_after) == (before, after)
    assert len(forward.regions) == after < forward.launches_before
    assert sum(r.flop > 0 for r in backward.regions) == 2 * products
    assert backward.launches_before > len(backward.regions)


@pytest.mark.parametrize("name", LAUNCHES)
def test_plan_computes_the_model(name: str) -> None:
    outcome = check(reduced(name), CHIP, {}, schedules=0).plan
    assert outcome.passed and outcome.checked >= 5, outcome


def test_kernels_compute_the_model() -> None:
    """Simulated: two products on one input, a gate, a sum of gradients of both."""
    outcome = check(reduced("gated_output"), CHIP, {}, schedules=1).kernels
    assert outcome is not None and outcome.passed and outcome.checked == 7, outcome
