"""Written files: what is kept of the model file, what is in them, and that they compute what the model does."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fusewright import __version__
from fusewright.capture import model_file
from fusewright.capture.model_file import ModelFile
from fusewright.chip import chip_for
from fusewright.errors import CannotCapture, NoKernel
from fusewright.fusion import reference
from fusewright.runtime.nvrtc import DEVICE_CODE
from fusewright.tools.emit import emit
from fusewright.tools.optimize import load_and_capture
from fusewright.tools.plan_check import captured_size
from judge import FORBIDDEN, complaints
from model_files import MODELS, REFUSED, Written, model, varied, written

ADDED = {"import torch", "from torch.utils.cpp_extension import load_inline"}


@pytest.fixture(params=MODELS)
def file(request: pytest.FixtureRequest) -> Written:
    return varied(request.param)


def loaded(text: str, folder: Path) -> ModelFile:
    path = folder / "written.py"
    path.write_text(text)
    return model_file.load(path, name="ModelNew")


def test_python_3_8_syntax(file: Written) -> None:
    ast.parse(file.text, feature_version=(3, 8))


def test_statements_are_kept(file: Written) -> None:
    """Every statement of the file is there, in order, but for what `forward` computes; five are new."""
    kept = [_dump(n) for n in _without_forward(ast.parse(file.original.replace("Model", "ModelNew"))).body]
    new = list(_without_forward(ast.parse(file.text.replace("ModelNewNew", "ModelNew"))).body)
    remaining = iter(new)
    added = []
    for wanted in kept:
        for node in remaining:
            if _dump(node) == wanted:
                break
            added.append(node)
        else:
            pytest.fail(f"lost or moved: {wanted[:200]}")
    added += remaining
    statements = [ast.unparse(n).split("\n")[0] for n in added]
    assert set(statements[:-3]) <= ADDED
    assert [s.split(" = ")[0] for s in statements[-3:-1]] == ["CUDA_SOURCE", "CPP_SOURCE"]
    assert statements[-1] == "if torch.cuda.is_available():"


def _without_forward(tree: ast.Module) -> ast.Module:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "ModelNew":
            forward = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
            docstring = ast.get_docstring(forward)
            forward.body = [ast.Expr(ast.Constant(docstring))]
            if any(isinstance(n, ast.FunctionDef) and n.name == "thaw" for n in node.body):  # see test_freeze
                place = node.body.index(forward)
                del node.body[place + 1 : place + 6]
    return tree


def _dump(node: ast.stmt) -> str:
    """Comparable: `Model` may be renamed in code alone, so texts are read as if it were so there too."""
    return ast.dump(node).replace("ModelNew", "Model")


def test_functions_are_kept_word_for_word(file: Written) -> None:
    for name in ("get_inputs", "get_init_inputs"):
        texts = [re.search(rf"^def {name}\(.*?(?=^\S|\Z)", t, re.M | re.S) for t in (file.original, file.text)]
        assert texts[0] and texts[1] and texts[0][0].rstrip() == texts[1][0].rstrip()


def test_the_judge_accepts_it(file: Written) -> None:
    user = file.original.replace("pass", "")  # what the author wrote is the author's
    assert [c for c in complaints(file.text) if c not in complaints(user)] == []


def test_the_judge_accepts_every_header() -> None:
    """Whichever of them a file needs."""
    for header in DEVICE_CODE.glob("*.cuh"):
        text = header.read_text()
        assert not [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text)], header.name


def test_kernels_say_what_they_compute(file: Written) -> None:
    comments = re.findall(r"^// (.*)\n(?:template.*\n)?__global__", file.text, re.M)
    every = (*file.emitted.planned, *file.emitted.frozen)
    launches = [launch for p in every for g in p.programs.values() for launch in g.launches]
    kernels = {(launch.kernel, launch.source) for launch in launches if 0 not in launch.grid}
    assert len(comments) == len(re.findall(r"^__global__", file.text, re.M)) == len(kernels) > 0
    for planned in file.emitted.planned:
        for region in planned.plan.regions:
            assert any(c.startswith(", ".join(region.operators)) for c in comments), region.operators


def test_it_imports_without_a_gpu_and_draws_the_same(file: Written, tmp_path: Path) -> None:
    ours = loaded(file.text, tmp_path)
    first, second = file.file.instantiate(device="cpu"), ours.instantiate(device="cpu")
    assert type(second.model).__name__ == "ModelNew"
    expected, found = first.model.state_dict(), second.model.state_dict()
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(value, found[name])
    for one, other in zip(pytree.tree_leaves(first.inputs), pytree.tree_leaves(second.inputs), strict=True):
        assert torch.equal(one, other)


def test_forward_gives_what_the_model_gives(file: Written, tmp_path: Path) -> None:
    """The class as it stands, its operator computed by the reference."""
    ours = loaded(file.text, tmp_path).instantiate(device="cpu")
    theirs = file.file.instantiate(device="cpu")
    with torch.no_grad(), operators(file):
        found, expected = ours.model(*ours.inputs), theirs.model(*theirs.inputs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if other is None:
            assert one is None
            continue
        assert one.shape == other.shape
        low = other.dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(one.to(other.dtype), other, rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-5)


@contextmanager
def operators(file: Written) -> Iterator[None]:
    """Defines the file's operators, as its C++ declares them, for the CPU."""
    found = re.search(r"torch\.ops\.(\w+)\.fused", file.text)
    assert found
    library = torch.library.Library(found[1], "DEF")
    for schema in re.findall(r'library\.def\("(.*)"\);', file.text):
        library.define(schema)
    inference = file.emitted.planned[0].plan
    captured = file.captured

    def fused(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        arguments = [captured_size(captured, i) if e is None else next(given) for i, e in enumerate(captured.arguments)]
        results = reference.run(inference, arguments, widen=True)
        return results[0] if len(results) == 1 else tuple(results)

    library.impl("fused", fused, "CPU")
    yield
    library._destroy()


# ---- one at a time


def test_comments_are_kept() -> None:
    def comments(text: str) -> list[str]:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return [t.string for t in tokens if t.type == tokenize.COMMENT]

    file = varied("surroundings")
    assert [c for c in comments(file.original) if c in comments(file.text)] == comments(file.original)


def test_constants_are_checked(tmp_path: Path) -> None:
    """The kernels hold numbers that the module has as attributes: an attribute that was changed is an error."""
    file = varied("named this")
    instance = loaded(file.text, tmp_path).instantiate(device="cpu")
    instance.model.factor = 2.5
    with pytest.raises(ValueError, match=r"these kernels were written for factor = 1\.5"):
        instance.model(*instance.inputs)


def test_arguments_that_are_no_tensors_are_checked(tmp_path: Path) -> None:
    """Given or default, also within a list: what they were when the file was written is in the kernels."""
    body = """
    def forward(self, x, factors, shift=3.0, *, both=True, mask=None):
        y = x * factors[1] + shift
        return torch.relu(y) if both else y
"""
    file = written(model(body, inputs="torch.rand(24, 20), [1.0, 2.5]"))
    instance = loaded(file.text, tmp_path).instantiate(device="cpu")
    x, factors = instance.inputs
    wrong: list[tuple[list[Any], dict[str, Any]]] = [
        ([x, [1.0, 3.5]], {}),
        ([x, factors, 4.0], {}),
        ([x, factors], {"both": False}),
        ([x, factors], {"mask": x}),
    ]
    for arguments, named in wrong:
        with pytest.raises(ValueError, match=r"factors\[1\] = 2\.5, shift = 3\.0, both = True, mask = None"):
            instance.model(*arguments, **named)


@pytest.mark.parametrize(
    ("first", "other"),
    [("{'s': 2.0}", {"s": 3.0}), ("[1, (2.0, 'a')]", [1, (2.5, "a")]), ("float('inf')", 1.0)],
)
def test_constants_in_containers_are_checked(first: str, other: object, tmp_path: Path) -> None:
    body = f"""
    def __init__(self):
        super().__init__()
        self.given = {first}

    def forward(self, x):
        return torch.clamp(x, max=float(str(self.given).count("2") + 1))
"""
    instance = loaded(written(model(body)).text, tmp_path).instantiate(device="cpu")
    instance.model.given = other
    with pytest.raises(ValueError, match="these kernels were written for given = "):
        instance.model(*instance.inputs)


def test_a_name_stays_within_its_comment(tmp_path: Path) -> None:
    """Line ends in a file's name are no code, bytes that are no text are escaped, and the longest name builds."""
    path, chip = tmp_path / "model.py", chip_for("sm_80")
    path.write_text(MODELS["no parameters"])
    file, instance, captured = load_and_capture(path, {}, None, chip)
    shown = {"a\nimport os": r"a\nimport os", "a\rb": r"a\rb", "a\u2028b": r"a\u2028b", "a\udcffb": r"a\udcffb"}
    for name in (*shown, "m" * 252):
        text = emit(
            replace(file, path=path.with_name(f"{name}.py")), instance.model, captured, chip, library=False
        ).text
        assert f"# Written by fusewright {__version__} from {shown.get(name, name)}.py for sm_80:" in text
        assert text.encode() and "import os" not in map(ast.unparse, ast.parse(text).body)
        assert len(re.findall(r'name="(.+)"', text)[0]) < 128


def test_constants_of_modules_whose_names_are_no_names(tmp_path: Path) -> None:
    body = """
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.LeakyReLU(0.2)})

    def forward(self, x):
        return self.parts["a-b"](x)
"""
    instance = loaded(written(model(body)).text, tmp_path).instantiate(device="cpu")
    instance.model.parts["a-b"].negative_slope = 0.3
    with pytest.raises(ValueError, match="negative_slope = 0"):
        instance.model(*instance.inputs)


@pytest.mark.parametrize(
    "parts",
    [
        "nn.ModuleDict({'1': nn.LeakyReLU(0.2), '0': nn.Linear(20, 20)})",
        "nn.Sequential(collections.OrderedDict([('1', nn.LeakyReLU(0.2)), ('0', nn.Linear(20, 20))]))",
        "nn.ModuleDict({'else': nn.Sequential(nn.Linear(20, 20), nn.LeakyReLU(0.2))})",
    ],
)
def test_modules_whose_names_are_digits_or_keywords(parts: str, tmp_path: Path) -> None:
    """Digits are the places of a list's modules, but the keys of a dictionary's."""
    body = f"""
    def __init__(self):
        super().__init__()
        self.parts = {parts}

    def forward(self, x):
        for name in self.parts._modules:
            x = self.parts._modules[name](x)
        return x
"""
    file = written("import collections\n" + model(body))
    ours, theirs = loaded(file.text, tmp_path).instantiate(device="cpu"), file.file.instantiate(device="cpu")
    with torch.no_grad(), operators(file):
        torch.testing.assert_close(ours.model(*ours.inputs).float(), theirs.model(*theirs.inputs))


@pytest.mark.parametrize("line", ["import torch, torch.nn as nn", "import torch as torch, torch.nn as nn"])
def test_torch_is_imported_once(line: str) -> None:
    text = varied("no parameters").original.replace("import torch\nimport torch.nn as nn\n", f"{line}\n")
    assert line in text
    imports = [n for n in ast.parse(written(text).text).body if isinstance(n, ast.Import)]
    assert sum(a.name == "torch" and a.asname in (None, "torch") for n in imports for a in n.names) == 1


def test_constants_of_submodules_are_checked(tmp_path: Path) -> None:
    file = varied("sequential")
    instance = loaded(file.text, tmp_path).instantiate(device="cpu")
    instance.model.seq[1].negative_slope = 0.0
    with pytest.raises(ValueError, match=r"written for \[?.*negative_slope = 0\.2"):
        instance.model(*instance.inputs)


def test_what_cannot_be_named() -> None:
    body = """
    def __init__(self):
        super().__init__()
        self.factor = np.float64(2.0)

    def forward(self, x):
        return x * float(self.factor)
"""
    with pytest.raises(CannotCapture, match=r"forward reads .*self.*factor.*plain Python number"):
        written("import numpy as np\n" + model(body))


@pytest.mark.parametrize(
    "name, says", [*zip(REFUSED, ("share memory", "one of its inputs", "no forward of its own"), strict=True)]
)
def test_refused(name: str, says: str) -> None:
    with pytest.raises(CannotCapture, match=says):
        written(REFUSED[name])


NO_GRAD = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)

    @torch.no_grad()
    def forward(self, {}):
        return torch.relu(self.gemm({})) + {}
"""


@pytest.mark.parametrize("names", [("x, y", "x", "y"), ("*xs", "xs[0]", "xs[1]"), ("x, *rest", "x", "rest[0]")])
@pytest.mark.parametrize("decorator", ["no_grad", "inference_mode"])
def test_a_decorator_of_torch_stays(decorator: str, names: tuple[str, str, str]) -> None:
    text = NO_GRAD.format(*names).replace("no_grad", decorator)
    file = written(model(text, inputs="torch.rand(24, 20), torch.rand(24, 16)"))
    assert [a for a in file.captured.arguments if a] == ["self.gemm.weight", "self.gemm.bias", *names[1:]]
    assert f"    @torch.{decorator}()\n    def forward(self, {names[0]}):\n        return torch.ops" in file.text
    assert [p.name for p in file.emitted.planned] == ["fused"]


@pytest.mark.parametrize("name", ["enable_grad()", "inference_mode(False)", "set_grad_enabled(False)"])
def test_a_decorator_of_torch_that_is_refused(name: str) -> None:
    text = NO_GRAD.format("x", "x", "1").replace("no_grad()", name)
    with pytest.raises(CannotCapture, match=rf"@torch\.{name.partition('(')[0]} on forward is not supported"):
        written(model(text))


def test_a_decorator_that_changes_forward_is_refused() -> None:
    """The graph holds what it does, and it would do that once more to what the kernels return."""
    twice = "def twice(f):\n    return lambda self, x: f(self, x) * 2\n\n\n"
    body = "    @twice\n    def forward(self, x):\n        return torch.relu(x)\n"
    with pytest.raises(CannotCapture, match="such as a decorator"):
        written(model(body, before=twice))


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_a_tensor_gives_are_refused() -> None:
    body = """
    def __init__(self):
        super().__init__()
        self.register_buffer("slope", torch.tensor(0.2))

    def forward(self, x):
        return F.leaky_relu(x, self.slope.item())
"""
    with pytest.raises(CannotCapture, match=r"as \.item\(\) .*run the model in process"):
        written(model(body))


def test_a_result_keeps_its_gradient() -> None:
    """A result without a gradient comes first: the second one's gradient is the second that backward is given."""
    file = varied("indices first")
    assert "gradients[1]" in file.text and "gradients[0]" not in file.text


def test_results_share_no_memory() -> None:
    """An addition's gradient is the incoming one, twice: an operator has to return tensors of their own."""
    backward = varied("residual").text.split("std::vector<at::Tensor> fusewright_backward(")[1]
    assert re.findall(r"results\.push_back\((.*)\);", backward)[:2] == ["grad.clone()", "grad.clone()"]


def test_batch_stays_free() -> None:
    """No size of the batch is in the C++."""
    text = written(MODELS["three dimensions"], chip="sm_80").text  # where no line is padded to 24
    host = text.split("// ======== host code")[1].split("class ModelNew")[0]
    assert "batch" in host and not re.search(r"[^0-9a-f_](6|24)[^0-9a-f]", host)


def test_wrong_use_is_named() -> None:
    host = varied("buffers").text.split("// ======== host code")[1]
    for name, shape in (("weight", "{16, 20}"), ("shift", "{16}"), ("x", "{batch, 20}")):
        assert re.search(rf'require\({name}_, "{name}", at::kFloat, {re.escape(shape)}', host)
    for words in ("but these kernels take", "move it there", "move the model and its inputs to the GPU"):
        assert words in host


def test_arguments_are_checked_before_autograd() -> None:
    """An error leaves no half-built graph behind: it comes before an autograd function is entered."""
    text = varied("tensor cores").text
    for function, entered in (("fused", "Fused::apply"), ("backward", "FirstDerivative::apply")):
        body = text.split(f" {function}_autograd(")[1].split("\n}\n")[0]
        assert 0 < body.index(f"fusewright_{function}_check(") < body.index(entered)


def test_tensor_cores() -> None:
    """On Hopper 16-bit products are copied by TMA and multiplied by wgmma, and the file says what it needs."""
    text = varied("tensor cores").text
    assert "GemmSm90<Config>" in text and "const auto x_map = tensor_map(pointer<__nv_bfloat16>(x), " in text
    assert '"-gencode=arch=compute_90a,code=sm_90a",' in text
    assert "if torch.cuda.get_device_capability() != (9, 0):" in text
    assert "#include <cuda.h>" in text and "-lcuda" not in text


def test_float32_by_halves() -> None:
    """One split of x and one of the weight serve forward and both products of backward, which splits its gradient."""
    text = varied("float32 halves").text
    functions = [text.split(f" fusewright_{n}(")[1].split("\n}\n")[0] for n in ("fused", "forward", "backward")]
    assert [f.count("// encode ") for f in functions] == [1, 1, 1]
    assert "// encode x, encode weight" in functions[1] and "// encode t1" in functions[2]
    assert "pointer<__half>(saved), CU_TENSOR_MAP_DATA_TYPE_FLOAT16" in functions[2]
    # Inference reads lines alone, which have exponents of their own; training reads all across too.
    for kernel in ("split_lines_f16x2_f16x2", "split_f16x2_f16x2"):
        assert len(re.findall(rf"^\s*{kernel}\(const float\*", text, re.MULTILINE)) == 1


def test_other_chips_have_kernels_that_run_everywhere() -> None:
    for text in (written(MODELS["tensor cores"], chip="sm_80").text, varied("bfloat16").text):
        assert "GemmSimt<" in text and "tensor_map" not in text and "sm90" not in text
        assert "-gencode" not in text and "get_device_capability" not in text


def test_dtype_is_said() -> None:
    text = written(MODELS["one in a list"], dtype=torch.bfloat16).text
    assert "for sm_90a, model and inputs cast to bfloat16:" in text and "at::kBFloat16" in text


SORT = model("""
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)

    def forward(self, x):
        return torch.sort(torch.relu(self.gemm(x)), dim=1, descending=True).values
""")


def test_an_operator_without_a_kernel_in_backward_alone() -> None:
    """It is in no line of the model: a user who looks for it there is told where it is."""
    halves = model("""
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.exp(a) * b
""")
    with pytest.raises(NoKernel, match=r"no kernel for cat \(no kernel family [^)]*, in backward\); "):
        written(halves)


def test_an_operator_that_has_kernels_for_other_dtypes() -> None:
    products = model("    def forward(self, x): return torch.mm(x, x.T)", inputs="torch.ones(4, 5, dtype=torch.int64)")
    with pytest.raises(NoKernel, match=r"no kernel for mm \([^)]* on int64\); "):
        written(products)


def test_an_operator_without_a_kernel() -> None:
    with pytest.raises(NoKernel, match=r"no kernel for .*sort \(no kernel family .*\).*--allow-library"):
        written(SORT)
    text = written(SORT, library=True).text
    assert "auto parts = at::_ops::sort::call(" in text and "#include <ATen/ops/sort_ops.h>" in text
    assert "at::addmm_out(" in text and "at::mm_out(" in text
