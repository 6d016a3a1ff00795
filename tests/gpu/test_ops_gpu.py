"""Every pointwise operator of torch's database on the GPU: values, gradients, dtypes, strides, NaN and infinities."""

from __future__ import annotations

import gpu_support as support
import pytest
import torch

import operator_samples as samples
from fusewright.fusion.plan import Fallback

pytestmark = pytest.mark.gpu

SAMPLES = 2  # of each dtype, beside one that is strided and one of special values
DTYPES = samples.FLOATS + samples.INTEGERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:  # the database takes seconds to import
        metafunc.parametrize("name", sorted(samples.database()) if torch.cuda.is_available() else ["every operator"])


def test_operator_is_as_accurate_as_eager(name: str) -> None:
    several = samples.calls(name, support.DEVICE, DTYPES, SAMPLES)
    assert several
    eager, exact = samples.evaluate(samples.together(several), several), samples.oracle(several)
    with support.building() as built:
        found = samples.evaluate(samples.compiled(several), several)
    problems = samples.problems(several, found, eager, exact)
    assert not problems, "\n".join(problems)
    left = {o.name for e in built for f in e.plan.steps if isinstance(f, Fallback) for o in f.origins}
    if name not in samples.ATEN:
        assert left <= samples.NOT_POINTWISE | ({"nextafter"} if name == "nextafter" else set())


def test_operators_of_the_database_through_dynamo() -> None:
    """One function of many operators, as `torch.compile` sees it."""

    def model(x: torch.Tensor) -> list[torch.Tensor]:
        y = torch.special.log_ndtr(x) + torch.lgamma(x.abs() + 1) * torch.sinc(x)
        z = torch.where(x > 0, torch.xlogy(x, x.abs() + 1), torch.logaddexp(x, y))
        return [y, z, torch.nan_to_num(z / x), torch.copysign(y, x), x.abs().pow(0.3) + torch.tensor(0.5)]

    x = torch.randn(300, 41, device=support.DEVICE, requires_grad=True)
    call = support.compiled(model)
    found, expected = call(x), model(x)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad([r.sum() for r in rs], x)[0] for rs in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
