"""The written file on a GPU: built by nvcc, verified, judged as the field's public benchmark does, and trained."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fusewright.capture import model_file
from fusewright.capture.model_file import ModelFile
from fusewright.cli import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "gemm_multiply_leakyrelu.py"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, torch.dtype]:
    """The file for the whole example; `optimize` verifies it on the way."""
    return _written(tmp_path_factory, request.param), request.param


def _written(factory: pytest.TempPathFactory, dtype: torch.dtype, *options: str) -> ModelFile:
    out = factory.mktemp("written") / "model_new.py"
    name = str(dtype).removeprefix("torch.")
    result = CliRunner().invoke(app, ["optimize", str(EXAMPLE), "-o", str(out), "--dtype", name, *options])
    print(result.output)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return model_file.load(out, name="ModelNew")


def _pair(written: tuple[ModelFile, torch.dtype], seed: int = 42) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Reference and candidate, built as the judge builds them: seeded, and no state dict copied."""
    file, dtype = written
    reference = model_file.load(EXAMPLE)
    return reference.build(seed).to("cuda", dtype), file.build(seed).to("cuda", dtype)


def test_public_judge(written: tuple[ModelFile, torch.dtype]) -> None:
    file, dtype = written
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for seed in range(5):
        reference, candidate = _pair(written, seed)
        inputs = [x.to("cuda", dtype) for x in file.inputs(seed)]
        with torch.no_grad():
            expected, actual = reference(*inputs), candidate(*inputs)
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected, atol=tolerance, rtol=tolerance)


def test_training_without_a_graph_break(written: tuple[ModelFile, torch.dtype]) -> None:
    _, dtype = written
    reference, candidate = _pair(written)
    compiled = torch.compile(candidate, backend="aot_eager", fullgraph=True)
    for batch in (64, 48, 1):
        x = torch.randn(batch, 8192, device="cuda", dtype=dtype, requires_grad=True)
        other = x.detach().clone().requires_grad_()
        gradient = torch.randn(batch, 8192, device="cuda", dtype=dtype)
        reference(x).backward(gradient)
        compiled(other).backward(gradient)
        oracle = x.grad.double()
        assert (other.grad - oracle).norm() <= 2e-2 * oracle.norm()
    for p, q in zip(reference.parameters(), candidate.parameters(), strict=True):
        assert (q.grad.double() - p.grad.double()).norm() <= 2e-2 * p.grad.double().norm()


# In a process of its own: what an error does to it is what is tested. Also after a graph was compiled.
_WRONG = """
import sys
import torch
from fusewright.capture import model_file

written = model_file.load(sys.argv[1], name="ModelNew")
dtype = getattr(torch, sys.argv[2])
model = written.build(42).to("cuda", dtype)

def fails(words, x, call=model):
    try:
        call(x)
    except RuntimeError as error:
        assert words in str(error), error
        print("named:", str(error).splitlines()[0])
    else:
        raise AssertionError(f"no error that says {words}")

def cases():
    fails("x has shape [4, 100], but these kernels take [4, 8192]", torch.randn(4, 100, device="cuda", dtype=dtype))
    fails("x has shape [8192], but", torch.randn(8192, device="cuda", dtype=dtype))
    fails("x is Double, but these kernels take", torch.randn(4, 8192, device="cuda", dtype=torch.float64))
    fails("x is on cpu", torch.randn(4, 8192, dtype=dtype))
    assert model(torch.randn(0, 8192, device="cuda", dtype=dtype)).shape == (0, 8192)

for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with mode():
        cases()
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
compiled(torch.randn(4, 8192, device="cuda", dtype=dtype)).sum().backward()
cases()
fails("x has shape", torch.randn(4, 100, device="cuda", dtype=dtype), compiled)
"""


def test_wrong_input_is_named(written: tuple[ModelFile, torch.dtype]) -> None:
    file, dtype = written
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-X", "faulthandler", "-c", _WRONG, str(file.path), name]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-6000:]


def test_tensor_cores_where_there_are_some(written: tuple[ModelFile, torch.dtype]) -> None:
    """On Hopper products are those of the tensor cores, at every size of the batch; the batch may be empty."""
    file, dtype = written
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100 or H200")
    assert "GemmSm90<Config>" in file.path.read_text()
    reference, candidate = _pair(written)
    for batch in (1, 7, 129, 1000, 0):
        x = torch.randn(batch, 8192, device="cuda", dtype=dtype)
        gradient = torch.randn(batch, 8192, device="cuda", dtype=dtype)
        for model in (reference, candidate):
            model.zero_grad()
            model(x).backward(gradient)
        for p, q in zip(reference.parameters(), candidate.parameters(), strict=True):
            assert (q.grad.double() - p.grad.double()).norm() <= 2e-2 * p.grad.double().norm(), batch


def test_double_backward_is_refused(written: tuple[ModelFile, torch.dtype]) -> None:
    _, candidate = _pair(written)
    x = torch.randn(4, 8192, device="cuda", dtype=written[1], requires_grad=True)
    (first,) = torch.autograd.grad(candidate(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


# ---- frozen


@pytest.fixture(scope="module")
def freezable(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100 or H200, where float32 weights are split")
    return _written(tmp_path_factory, torch.float32, "--no-verify")


def _splits(call: Callable[[], torch.Tensor]) -> int:
    """How many matrices are split in a call: kernels are named after them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [m for e in profile.events() if (m := re.search(r"\bsplit(_lines)?(_f16x2)+\b", e.name))]
    return sum(m[0].count("f16x2") for m in found)


def test_frozen_results_are_the_same_bits(freezable: ModelFile, capsys: pytest.CaptureFixture[str]) -> None:
    model = freezable.build(42).to("cuda")
    inputs = [torch.randn(batch, 8192, device="cuda") for batch in (1, 7, 300, 1024, 0)]
    inputs[2][5] *= 2.0**-145  # below what halves hold
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        assert _splits(lambda: model(inputs[2])) == 2
        before = torch.cuda.memory_allocated()
        assert model.freeze() is model
        kept = torch.cuda.memory_allocated() - before
        assert 0 <= kept - 4 * (8192 * 8192 + 8192) < 4096
        assert "keeps 268,468,224 bytes" in capsys.readouterr().out
        assert _splits(lambda: model(inputs[2])) == 1
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(model(x), y) and torch.equal(compiled(x), y)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(model(inputs[3]), expected[3])
        torch.cuda.synchronize()


def test_frozen_parameters_change_between_thawing_and_freezing(freezable: ModelFile) -> None:
    model = freezable.build(42).to("cuda")
    other = {name: 2 * value for name, value in model.state_dict().items()}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, 8192, device="cuda")
    with torch.no_grad():
        compiled(x)
        first = model.freeze()(x)
        assert torch.equal(compiled(x), first)
        model.gemm.weight.mul_(2)  # what was promised not to happen
        stale = model(x)
        fresh = copy.deepcopy(model).thaw()(x)
        assert not torch.equal(stale, fresh)
        assert torch.equal(model.freeze()(x), fresh) and torch.equal(compiled(x), fresh)
        model.load_state_dict(other)
        doubled = model(x)
        assert not torch.equal(doubled, fresh) and torch.equal(compiled(x), doubled)


def test_frozen_calls_have_no_gradients(freezable: ModelFile) -> None:
    model = freezable.build(42).to("cuda").freeze()
    x = torch.randn(64, 8192, device="cuda")
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with pytest.raises(RuntimeError, match=r"call it under torch\.no_grad\(\), or call its method thaw\(\)"):
            call(x)
    model.thaw()(x).sum().backward()
    assert model.gemm.weight.grad is not None
