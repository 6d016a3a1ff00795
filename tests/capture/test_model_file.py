from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusewright.capture.model_file import ModelFile, constants, load, load_candidate, parse_setting
from fusewright.errors import EagerFailure, FusewrightError, MixedDevices, ModelFileError, UnknownSetting

GOOD = '''"""A linear layer, scaled."""
import torch
import torch.nn as nn

batch_size = 4  # rows
features = 8
shape: tuple = (
    1,
    2,
)
scales = [
    1.0,
    -2.0,
]
name = "gemüse"; slope = 0.1
total = features * 2


class Model(nn.Module):
    def __init__(self, features, slope=0.1):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.register_buffer("count", torch.arange(3))
        self.slope = slope

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.linear(x) * 2.0, self.slope)


def get_inputs():
    return [torch.rand(batch_size, features)]


def get_init_inputs():
    return [features, slope]
'''

MINIMAL = """import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))
    def forward(self, *x):
        return self.w
def get_inputs():
    return [torch.ones(3)]
def get_init_inputs():
    return []
"""

Writer = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def write(text: str) -> Path:
        path = tmp_path / "model.py"
        path.write_bytes(text.encode())
        return path

    return write


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def message(error_type: type[FusewrightError], action: Callable[[], Any]) -> str:
    with pytest.raises(error_type) as caught:
        action()
    return str(caught.value)


def test_loads_what_the_file_defines(write: Writer) -> None:
    path = write(GOOD)
    file = load(str(path))
    assert isinstance(file, ModelFile)
    assert file.path == path
    assert file.source == GOOD
    assert isinstance(file.tree, ast.Module)
    assert file.namespace["total"] == 16
    assert issubclass(file.Model, nn.Module)
    assert file.get_init_inputs() == [8, 0.1]
    with pytest.raises(FrozenInstanceError):
        file.source = ""  # type: ignore[misc]


def test_runs_the_file_and_nothing_else(write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No function of it is called, no main block run, nothing written, and the path and modules stay as they are."""
    body = "\nprint('hello')\ndef get_inputs(): raise RuntimeError\nif __name__ == '__main__': raise RuntimeError\n"
    path = write(MINIMAL + body)
    before, python_path = set(os.listdir(tmp_path)), list(sys.path)
    load(path)
    assert capsys.readouterr().out == "hello\n"
    assert set(os.listdir(tmp_path)) == before
    assert sys.path == python_path


def test_a_file_that_changes_the_folder(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays there itself, and the command where it was called: what that writes is relative to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "number").write_text("3")
    text = "import os\nos.chdir('data')\n" + MINIMAL.replace(
        "torch.ones(3)]", "torch.ones(int(open('number').read()))]"
    )
    file = load(write(text))
    assert [t.tolist() for t in file.inputs()] == [[1.0] * 3] and Path.cwd() == tmp_path
    with pytest.raises(ModelFileError, match="ZeroDivisionError"):
        load(write(text + "1 / 0\n"))
    assert Path.cwd() == tmp_path


def test_two_files_do_not_share_names(write: Writer) -> None:
    first = load(write(GOOD))
    second = load(write(GOOD.replace("features = 8", "features = 2")))
    assert first.get_init_inputs() == [8, 0.1]
    assert second.get_init_inputs() == [2, 0.1]


def test_dataclasses_and_annotations_work(write: Writer) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    width: int = 3\n" + MINIMAL
    )
    assert load(write(text)).namespace["Config"]().width == 3


def test_windows_line_ends_and_byte_order_mark(write: Writer) -> None:
    file = load(write("\ufeff" + GOOD.replace("\n", "\r\n")), {"features": 16})
    assert file.get_init_inputs() == [16, 0.1]


# Instances


def test_instantiate_draws_as_the_judge_does(write: Writer) -> None:
    file = load(write(GOOD.replace("return [features, slope]", "torch.rand(5); return [features, slope]")))
    for seed in (42, 7):
        model, inputs = file.instantiate(seed, device="cpu")
        torch.manual_seed(seed)
        expected = file.Model(8)
        torch.manual_seed(seed)
        (x,) = file.get_inputs()
        assert torch.equal(model.linear.weight, expected.linear.weight)
        assert torch.equal(inputs[0], x)
    x = file.instantiate(device="cpu").inputs[0]
    torch.manual_seed(42)
    assert torch.equal(x, torch.rand(4, 8))


def test_build_and_inputs_leave_the_generator_alone(write: Writer) -> None:
    file = load(write(GOOD))
    torch.manual_seed(5)
    weights = [file.build().linear.weight for _ in range(2)]
    assert not torch.equal(*weights)
    torch.manual_seed(5)
    assert torch.equal(file.build().linear.weight, weights[0])
    assert not torch.equal(file.inputs()[0], file.inputs()[0])
    assert torch.equal(file.inputs(seed=1)[0], file.inputs(seed=1)[0])


def test_dtype_casts_what_is_floating(write: Writer) -> None:
    text = GOOD.replace("return [torch.rand(batch_size, features)]", "return [torch.rand(4, 8), torch.arange(3), 3.14]")
    model, inputs = load(write(text)).instantiate(dtype=torch.float16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.count.dtype == torch.int64
    assert [inputs[0].dtype, inputs[1].dtype, inputs[2]] == [torch.float16, torch.int64, 3.14]
    assert load(write(text)).instantiate(device="cpu").inputs[0].dtype == torch.float32


def test_inputs_keep_identity_gradients_and_nesting(write: Writer) -> None:
    text = MINIMAL.replace(
        "return [torch.ones(3)]",
        "x = torch.ones(3, requires_grad=True); return (x, (x, {'h': torch.zeros(2)}), 2, None)",
    )
    _, inputs = load(write(text)).instantiate(dtype=torch.float64)
    x, (again, state), two, none = inputs
    assert x is again
    assert x.is_leaf
    assert x.requires_grad
    assert x.dtype == state["h"].dtype == torch.float64
    assert not state["h"].requires_grad
    assert (two, none) == (2, None)


def test_run_is_eager_mode(write: Writer) -> None:
    file = load(write(GOOD))
    instance = file.instantiate()
    result = file.run(instance)
    assert not result.requires_grad
    assert torch.equal(result, instance.model(*instance.inputs))


@pytest.mark.gpu
def test_moves_to_the_gpu(write: Writer) -> None:
    file = load(write(GOOD))
    model, inputs = file.instantiate()
    assert {t.device.type for t in (*model.parameters(), *model.buffers(), *inputs)} == {"cuda"}
    assert torch.equal(inputs[0].cpu(), file.instantiate(device="cpu").inputs[0])


# Files that use the GPU, where there is none

ON_GPU = """import torch
import torch.nn as nn
from torch import Generator
device = torch.device("cuda:0")
table = torch.arange(3, device=device).cuda()
generator = Generator(device="cuda").manual_seed(3)
class Model(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.a = nn.Linear(n, n, device="cuda")
        self.b = nn.Linear(n, n).cuda()
        self.c = nn.Linear(n, n).to(device)
        self.d = nn.Parameter(torch.empty(n, device=device).normal_())
        self.register_buffer("e", torch.ones(n).to("cuda", torch.float16))
    def forward(self, x):
        return self.c(self.b(self.a(x))) + self.d + self.e + torch.zeros_like(x, device="cuda") + table.cuda().sum()
def get_inputs():
    with torch.device("cuda"):
        x = torch.ones(2, 3)
    return [x.to(0) * torch.randn(2, 3, device=0, generator=generator).to(device=0)]
def get_init_inputs():
    return [3]
"""


@pytest.mark.usefixtures("no_gpu")
def test_cuda_becomes_the_cpu(write: Writer) -> None:
    file = load(write(ON_GPU))
    instance = file.instantiate()
    assert {t.device.type for t in (*instance.model.parameters(), *instance.model.buffers())} == {"cpu"}
    assert file.run(instance).device.type == "cpu"
    assert file.namespace["table"].device.type == "cpu"
    assert torch.device("cuda").type == "cuda"  # the redirection ends with the file
    assert torch.Generator is torch._C.Generator


@pytest.mark.usefixtures("no_gpu")
def test_default_device_becomes_the_cpu(write: Writer) -> None:
    file = load(write(MINIMAL.replace("class Model", "torch.set_default_device('cuda')\nclass Model")))
    try:
        assert file.instantiate().inputs[0].device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.gpu
def test_cuda_stays_cuda(write: Writer) -> None:
    file = load(write(ON_GPU))
    assert file.run(file.instantiate()).device.type == "cuda"
    assert file.namespace["table"].device.type == "cuda"


# Settings


def test_settings_replace_constants(write: Writer) -> None:
    settings = {"batch_size": 16, "features": 2, "scales": [0.5], "shape": (3,), "slope": -0.25, "name": "rübe"}
    file = load(write(GOOD), settings)
    for name, value in settings.items():
        assert file.namespace[name] == value
    assert file.namespace["total"] == 4  # what is computed from a constant follows
    assert file.instantiate(device="cpu").inputs[0].shape == (16, 2)
    assert "batch_size = 16  # rows" in file.source
    lines = file.source.split("\n")
    assert lines.index("class Model(nn.Module):") == GOOD.split("\n").index("class Model(nn.Module):")
    assert ast.dump(file.tree) == ast.dump(ast.parse(file.source))


def test_settings_that_the_file_does_not_have(write: Writer) -> None:
    path = write(GOOD)
    text = message(UnknownSetting, lambda: load(path, {"batch": 3}))
    assert str(path) in text
    assert "no constant 'batch'" in text
    assert "batch_size = 4, features = 8, shape = (1, 2), scales = [1.0, -2.0], name = 'gemüse', slope = 0.1" in text
    assert "total" not in text
    assert "computes total (features * 2)" in message(UnknownSetting, lambda: load(path, {"total": 3}))
    assert "no constants" in message(UnknownSetting, lambda: load(write(MINIMAL), {"n": 3}))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), object(), len, torch.float32])
def test_settings_that_are_no_literals(write: Writer, value: object) -> None:
    assert "features" in message(UnknownSetting, lambda: load(write(GOOD), {"features": value}))


def test_only_literals_of_names_are_constants() -> None:
    tree = ast.parse(
        "a = -1\nb, (c, z) = 1, [2, len('x')]\nd = e = 3\nf = a\ng = len('x')\nh: int = 4\ni: int\nj.k = 5\n"
        "if a: l = 6\na = 7\nm, *n = 1, 2\no, p = 1, *q\nr, s = t"
    )
    assert list(constants(tree)) == ["a", "b", "c", "h"]
    assert len(constants(tree)["a"]) == 2


def test_settings_of_several_in_one_line(write: Writer) -> None:
    path = write("rows, width, shape = 4, (8), (1, 2)\n" + MINIMAL)
    file = load(path, {"width": 16, "shape": (3, 4)})
    assert file.source.startswith("rows, width, shape = 4, (16), (3, 4)\n")
    assert [file.namespace[n] for n in ("rows", "width", "shape")] == [4, 16, (3, 4)]


def test_a_candidate_has_a_class_of_its_own_and_some_of_the_settings(write: Writer) -> None:
    text = "rows = 4\n" + MINIMAL
    file = load_candidate(write(text.replace("class Model(", "class ModelNew(")), {"rows": 1, "other": 2})
    assert file.namespace["rows"] == 1 and "other" not in file.namespace
    assert "no class ModelNew (the file defines Model)" in message(ModelFileError, lambda: load_candidate(write(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("n=4", ("n", 4)), (" n = (1, -2.5) ", ("n", (1, -2.5))), ("s='a=b'", ("s", "a=b")), ("f=True", ("f", True))],
)
def test_parse_setting(text: str, expected: tuple[str, object]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    "text", ["n", "=4", "a b=4", "n=", "act=relu", "n=__import__('os').system('true')", "n=2*3", "n=[", "4=n"]
)
def test_parse_setting_never_evaluates(text: str) -> None:
    with pytest.raises(UnknownSetting):
        parse_setting(text)


# Errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ndef f(:\n    pass\n", ":2: this is not Python: invalid syntax\n    def f(:"),
        ("x = 1\nreturn x\n", ":2: this is not Python: 'return' outside function\n    return x"),
        (f"x = {'-' * 100_000}1\n", "this is not Python: it is nested too deeply"),
        ("x = '\0'\n", "this is not Python: source code string cannot contain null bytes"),
        (MINIMAL.replace("class Model", "class Net"), "no class Model (the file defines Net); name the module"),
        (MINIMAL.replace("def get_inputs", "def inputs"), "there is no get_inputs(); define it"),
        (MINIMAL.replace("def get_init_inputs", "def init"), "there is no get_init_inputs(); define it"),
        (MINIMAL.replace("(torch.nn.Module)", ""), ":2: Model is no subclass of torch.nn.Module"),
        (MINIMAL + "get_inputs = [1]\n", "get_inputs is a value of type list; let it be a function"),
        (MINIMAL + "def f():\n    return 1 / 0\nf()\n", ":13: the file raises when it is run: ZeroDivisionError: "),
        (
            MINIMAL + "class Own(BaseException): pass\nraise Own('mine')\n",
            ":13: the file raises when it is run: Own: mine",
        ),
        (
            MINIMAL + "raise SystemExit(3)\n",
            ":12: the file raises when it is run: SystemExit: 3\n    raise SystemExit(3)",
        ),
        ("import torch\nimport no_such_package\n", ":2: the file imports what is not installed"),
    ],
)
def test_files_that_cannot_be_loaded(write: Writer, text: str, expected: str) -> None:
    path = write(text)
    found = message(ModelFileError, lambda: load(path))
    assert found.startswith(str(path))
    assert expected in found


def test_raising_file_shows_its_innermost_line(write: Writer) -> None:
    """The line is that of the file, not of ours nor of the library that the file called."""
    path = write("import torch\ndef f(x):\n    return torch.mm(x, x)\n\nf(torch.ones(2, 3))\n")
    found = message(ModelFileError, lambda: load(path))
    assert found.startswith(f"{path}:3: the file raises when it is run: RuntimeError: mat1 and mat2")
    assert "\n    return torch.mm(x, x)" in found
    assert "Traceback" not in found
    assert not [name for name in sys.modules if getattr(sys.modules[name], "__file__", None) == str(path)]


def test_an_error_that_cannot_be_shown(write: Writer) -> None:
    text = "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n\n\nraise Mute\n"
    with pytest.raises(ModelFileError, match=r":6: the file raises when it is run: Mute\n    raise Mute"):
        load(write(text))


def test_interruption_passes_through(write: Writer) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(write("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        load(write(MINIMAL.replace("return [torch.ones(3)]", "raise KeyboardInterrupt"))).inputs()


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"# one\n# caf\xe9\n")
    assert f"{path}:2: the file is not UTF-8" in message(ModelFileError, lambda: load(path))
    path.write_bytes("# coding: ascii\n# café\n".encode())
    assert f"{path}:2: the file is not ascii text; save it as UTF-8" in message(ModelFileError, lambda: load(path))


def test_a_declared_encoding(tmp_path: Path) -> None:
    """It is read as Python reads it, and the text says what it is written in."""
    path = tmp_path / "latin.py"
    for head in ("# coding: {}\n", "#!/usr/bin/env python\n# -*- coding: {} -*-\n"):
        path.write_bytes(f"{head.format('latin-1')}name = 'é'\n{MINIMAL}".encode("latin-1"))
        file = load(path)
        assert file.namespace["name"] == "é" and file.source.startswith(head.format("utf-8"))
    path.write_text(f"x = 1\n# coding: ascii\n{MINIMAL}")
    assert "# coding: ascii\n" in load(path).source


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "no such file" in message(ModelFileError, lambda: load(tmp_path / "missing.py"))
    assert "this is a folder" in message(ModelFileError, lambda: load(tmp_path))
    (tmp_path / "file").touch()
    assert "cannot be read" in message(ModelFileError, lambda: load(tmp_path / "file" / "model.py"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_unreadable_file(write: Writer) -> None:
    path = write(MINIMAL)
    path.chmod(0)
    program = (
        "import sys, os; from fusewright.capture.model_file import load; from fusewright.errors import ModelFileError\n"
        "os.setgroups([]); file = sys.argv[1]; os.chdir(os.path.dirname(file)); os.setuid(65534)\n"
        "try: load('model.py')\nexcept ModelFileError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout == "model.py: the file cannot be read (Permission denied)\n"


@pytest.mark.parametrize(
    ("old", "new", "error", "expected"),
    [
        (
            "return []",
            "return [1, 2]",
            ModelFileError,
            ":2: the constructor is Model(), but get_init_inputs gives 2 values",
        ),
        (
            "__init__(self)",
            "__init__(self, n)",
            ModelFileError,
            "Model(n), but get_init_inputs gives 0 values: missing",
        ),
        ("return []", "return 3", ModelFileError, ":10: get_init_inputs returns a value of type int; let"),
        (
            "return [torch.ones(3)]",
            "return torch.ones(3)",
            ModelFileError,
            ":8: get_inputs returns a value of type Tensor",
        ),
        ("return [torch.ones(3)]", "return None", ModelFileError, ":8: get_inputs returns a value of type NoneType"),
        (
            "return [torch.ones(3)]",
            "return [1, ['x']]",
            ModelFileError,
            ":8: get_inputs()[1][0] is a value of type str",
        ),
        (
            "return [torch.ones(3)]",
            "return [1 / 0]",
            EagerFailure,
            ":9: get_inputs raises: ZeroDivisionError: division",
        ),
        (
            "return [torch.ones(3)]",
            "raise type('Own', (BaseException,), {})('mine')",
            EagerFailure,
            ":9: get_inputs raises: Own: mine",
        ),
        ("return []", "return [1 / 0]", EagerFailure, ":11: get_init_inputs raises: ZeroDivisionError"),
        (
            "torch.ones(3))",
            "torch.ones(3) @ torch.ones(4))",
            EagerFailure,
            ":5: the constructor of Model raises: Runtime",
        ),
        (
            "torch.ones(3)]",
            "torch.ones(3), torch.ones(1, device='meta')]",
            MixedDevices,
            ":8: tensors of get_inputs",
        ),
        ("torch.ones(3))", "torch.ones(3, device='meta'))", MixedDevices, "are on meta, without values"),
    ],
)
def test_files_that_give_no_instance(
    write: Writer, old: str, new: str, error: type[FusewrightError], expected: str
) -> None:
    path = write(MINIMAL.replace(old, new, 1))
    found = message(error, load(path).instantiate)
    assert found.startswith(str(path))
    assert expected in found


def test_model_that_fails_in_eager_mode(write: Writer) -> None:
    file = load(write(GOOD.replace("torch.rand(batch_size, features)", "torch.rand(3, 5)")))
    found = message(EagerFailure, lambda: file.run(file.instantiate()))
    assert ":27: the model fails in eager mode: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in found
    assert "return torch.nn.functional.leaky_relu" in found
