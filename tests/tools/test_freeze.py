"""`freeze` in written files: what is kept, what calls leave out then, when it is forgotten; that no bit changes."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import fusewright.tools.optimize
import model_files
from fusewright.capture import model_file
from fusewright.chip import chip_for
from fusewright.fusion import reference
from fusewright.fusion.plan import Encode, View
from fusewright.ir.encoding import Halves
from fusewright.kernels.gemm_sm90 import HalfProducts
from fusewright.runtime.executable import Executable
from fusewright.runtime.target import SimulatorTarget
from fusewright.tools.freeze import kept
from fusewright.tools.optimize import Request, optimize
from fusewright.tools.planned import Planned
from judge import complaints
from model_files import MODELS, Written, model, varied, written

CHIP = replace(chip_for("sm_90a"), multiprocessors=2)  # few blocks to simulate

# A weight that two products share, one that is turned, one that is computed, and a buffer.
SEVERAL = model(
    """
    def __init__(this):
        super().__init__()
        this.up = nn.Linear(136, 136)
        this.down = nn.Parameter(torch.randn(136, 40) / 12)
        this.register_buffer("mixed", torch.randn(40, 136) / 6)

    def forward(this, x):
        y = torch.relu(F.linear(torch.relu(this.up(x)), this.up.weight))
        return {"first": y @ this.down, "second": y @ (this.mixed * 2.0).t()}
""",
    inputs="torch.randn(24, 136)",
)


@pytest.fixture(scope="module")
def several() -> Written:
    """By halves, however small its products are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_files, "chip_for", lambda arch: CHIP)
        patch.setattr(HalfProducts, "gain", lambda *_: 1.0)
        patch.setattr(HalfProducts, "split", lambda *_: 0.0)
        return written(SEVERAL)


def encoded(planned: Planned) -> list[str]:
    return [m.buffer for s in planned.plan.steps if isinstance(s, Encode) for m in s.matrices]


def test_parameters_are_split_by_freeze_alone(several: Written) -> None:
    """And each once; what calls compute, they split."""
    fused, *_ = several.emitted.planned
    split, frozen = several.emitted.frozen
    assert sorted(encoded(split)) == ["down", "weight"]
    assert sorted([*encoded(split), *encoded(frozen)]) == sorted(encoded(fused))
    assert not {"down", "weight", "mixed"} & {*encoded(frozen)} and len(encoded(frozen)) == 4
    for step in split.plan.encodes:
        assert len(split.programs[step.name].launches) == (1 if step.results[0].halves.by_line else 2)
    assert [r.name for r in frozen.plan.regions] == [r.name for r in fused.plan.regions]


def test_what_it_costs_is_said(tmp_path: Path) -> None:
    path, written_to = tmp_path / "model.py", io.StringIO()
    path.write_text(MODELS["float32 halves"])
    request = Request(path, tmp_path / "new.py", chip_for("sm_90a"), None, {}, library=False, verify=False)
    rows = optimize(request, Console(file=written_to, width=200)).kernels
    assert "ModelNew.freeze() splits the parameters once and keeps 8.39 MB beside them" in written_to.getvalue()
    assert [row.kernel for row in rows].count("split_f16x2") == 1, "a kernel is listed once"


def test_results_are_the_same_bits(several: Written) -> None:
    """The products are those of inference; the halves are the same, whichever matrices are split together."""
    fused, (split, frozen) = several.emitted.planned[0], several.emitted.frozen
    for region in fused.plan.regions:
        assert frozen.programs[region.name] is fused.programs[region.name]
    together = next(s for s in fused.plan.encodes if len(s.matrices) == 2 and "weight" in s.reads())
    given = {m.buffer: torch.randn(24 if m.buffer == "x" else 136, 136) for m in together.matrices}
    steps = [(p, s) for p in (split, frozen) for s in p.plan.encodes if {*s.writes()} & {*together.writes()}]
    runs = [_simulated(planned, step) for planned, step in [(fused, together), *steps]]  # all compile at once
    made, *apart = [run(*(given[name] for name in run.plan.inputs)) for run in runs]
    assert sorted(name for run in runs[1:] for name in run.plan.steps[0].writes()) == sorted(together.writes())
    for name, halves in zip(together.writes(), made, strict=True):
        (other,) = next(a for run, a in zip(runs[1:], apart, strict=True) if name in run.plan.steps[0].writes())
        assert halves.shape == other.shape and halves.count_nonzero() > 1000
        of, result = next(x for x in zip(together.matrices, together.results, strict=True) if x[1].buffer == name)
        layout = Halves(*given[of.buffer].shape, result.halves.planes)
        for ours, theirs in zip(_parts(halves, layout), _parts(other, layout), strict=True):
            assert torch.equal(ours, theirs)


def _parts(words: Tensor, layout: Halves) -> tuple[Tensor, Tensor]:
    """The planes without what pads their lines, which nobody writes, and the rest."""
    count = layout.planes * layout.plane
    planes = words.view(torch.int16)[:count].view(layout.planes * layout.lines, layout.padded)
    return planes[:, : layout.length], words[count // 2 :]


def _simulated(planned: Planned, step: Encode) -> Executable:
    """The step alone."""
    buffers = [planned.plan.buffers[name] for name in step.writes()]
    outputs = tuple(View(b.name, b.shape, b.stride) for b in buffers)
    plan = replace(planned.plan, inputs=tuple(step.reads()), outputs=outputs, steps=(step,))
    return Executable(plan, planned.programs, SimulatorTarget(CHIP), torch.device("cpu"))


def test_tf32_reads_planes() -> None:
    """Calls round the weight in registers, which is slower than reading its halves, but for their split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusewright.tools.optimize, "tf32_allowed", lambda: True)
        # Large enough that halves pay: smaller ones read floats as they lie.
        text = MODELS["float32 halves"].replace("torch.rand(1024,", "torch.rand(2048,")
        file = written(text.replace("nn.Linear(2048, 1024)", "nn.Linear(2048, 4096)"))
    (fused, *_), (split, frozen) = file.emitted.planned, file.emitted.frozen
    assert [[r.halves.planes for r in e.results] for e in fused.plan.encodes] == [[1, 0]], "no longer a test"
    assert [[r.halves.planes for r in e.results] for p in (split, frozen) for e in p.plan.encodes] == [[1], [1]]
    (region,) = frozen.plan.regions
    assert (
        "registers" in fused.programs[region.name].variant and "registers" not in frozen.programs[region.name].variant
    )
    words = 4096 * 2048 // 2 + 4096
    assert kept(file.emitted.frozen) == 4 * words and "Results keep TF32's precision" in file.text
    assert complaints(file.text) == []
    text = file.text.split(" fusewright_frozen(")[1].split("\n}\n")[0]
    assert f"at::kInt, {{{words}}}" in file.text and "pointer<__half>(halves1)" in text


# ---- the class


class Loaded:
    """The class of a written file with its operators computed by the reference, which counts the calls of each."""

    def __init__(self, file: Written, folder: Path) -> None:
        path = folder / "written.py"
        path.write_text(file.text)
        self.instance = model_file.load(path, name="ModelNew").instantiate(device="cpu")
        self.file, self.calls = file, list[str]()

    def operators(self, library: torch.library.Library) -> None:
        plans = {p.name: p.plan for p in (self.file.emitted.planned[0], *self.file.emitted.frozen)}
        for schema in re.findall(r'library\.def\("(.*)"\);', self.file.text):
            library.define(schema)
        for name, plan in plans.items():

            def run(*tensors: Tensor, name: str = name, plan: Any = plan) -> Any:
                self.calls.append(name)
                given = iter(tensors)
                arguments = [next(given) if isinstance(n, str) else 24 for n in plan.inputs]
                results = reference.run(plan, arguments, widen=False)
                return results[0] if len(results) == 1 else tuple(results)

            library.impl(name, run, "CPU")

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.instance.model(*self.instance.inputs)


@contextmanager
def loaded(file: Written, folder: Path) -> Iterator[Loaded]:
    space = re.search(r"torch\.ops\.(\w+)\.fused", file.text)
    assert space
    made, library = Loaded(file, folder), torch.library.Library(space[1], "DEF")
    made.operators(library)
    yield made
    library._destroy()


@pytest.fixture
def ours(several: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with loaded(several, tmp_path) as made:
        yield made


def test_frozen_calls_split_no_parameter(ours: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    expected, model = ours(), ours.instance.model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.freeze() is model
    words = 136 * 192 + 136 + 136 * 64 + 136 + 40 + 1  # one is read along its lines, one across them
    assert f"keeps {4 * words:,} bytes" in capsys.readouterr().out
    found = [ours(), ours()]
    assert ours.calls == ["fused", "split", "frozen", "frozen"]
    assert all(torch.equal(f[name], expected[name]) for f in found for name in ("first", "second"))
    assert list(model.state_dict()) == list(state)
    assert model.thaw() is model
    ours()
    assert ours.calls[-1] == "fused"


def _to(model: Any) -> None:
    model.to(torch.float64)


def _load(model: Any) -> None:
    model.load_state_dict(model.state_dict())


def _load_within(model: Any) -> None:
    outer = torch.nn.Sequential(model)
    outer.load_state_dict(outer.state_dict())


@pytest.mark.parametrize("change", [_to, _load, _load_within])
def test_new_parameters_thaw(ours: Loaded, change: Any) -> None:
    model = ours.instance.model.freeze()
    assert model._halves
    change(model)
    assert not model._halves


def test_a_copy_is_frozen_too(ours: Loaded) -> None:
    model = ours.instance.model.freeze()
    other = copy.deepcopy(model).thaw()
    assert model._halves and not other._halves
    again = copy.deepcopy(model)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model._halves, again._halves, strict=True))


def test_the_judge_accepts_it(several: Written) -> None:
    assert complaints(several.text) == [] and "Results stay the same, bit for bit" in several.text


@pytest.mark.parametrize("name", ["tensor cores", "two linears", "bfloat16"])
def test_nothing_to_keep(name: str) -> None:
    """16-bit products, and those of few elements, split no parameters: their files have no such methods."""
    assert not varied(name).emitted.frozen and "freeze" not in varied(name).text


@pytest.mark.parametrize("method", ["freeze", "_apply"])
def test_methods_of_the_author_stay(method: str) -> None:
    own = f"    def {method}(self, *args):\n        return super().{method}(*args)\n"
    file = written(MODELS["float32 halves"].replace("\n\ndef get_inputs", f"\n{own}\n\ndef get_inputs", 1))
    assert not file.emitted.frozen and "def thaw" not in file.text and own in file.text


def test_indented_as_the_author_does() -> None:
    body = MODELS["float32 halves"]
    tabs = written(re.sub(r"^( {4})+", lambda m: "\t" * (len(m[0]) // 4), body, flags=re.M)).text
    methods = tabs.split("class ModelNew")[1].split("\ndef get_inputs")[0]
    assert "\tdef thaw(self):" in methods and "\t\tself._halves = ()" in methods and "\n  " not in methods
