"""The model-file format: a Python file with `class Model(nn.Module)`, `get_inputs()` and `get_init_inputs()`.

`Model(*get_init_inputs())` builds the model and `model(*get_inputs())` runs it. The format is that of the field's
public benchmark of GPU kernels.
"""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import os
import re
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusewright.capture.without_gpu import without_gpu
from fusewright.errors import EagerFailure, MixedDevices, ModelFileError, UnknownSetting, raised

SEED = 42  # the public judge's
FUNCTIONS = ("get_inputs", "get_init_inputs")

# Of the encoding (PEP 263), in the first line or below one that is a comment or empty.
_DECLARATION = re.compile(r"\A((?:[ \t\f]*(?:#.*)?\n)?[ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+", re.ASCII)
_serial = itertools.count()
_folders: MutableMapping[ModuleType, str] = WeakKeyDictionary()


class Instance(NamedTuple):
    """A model and one set of inputs for it, on the same device. inputs: tensors, numbers, and containers of these."""

    model: nn.Module
    inputs: list[Any]


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A model file that has been run.

    path: as the user gave it. source: its text as it was run, with settings in place; lines are where they were.
    tree: of that text. module: what running it left behind.
    """

    path: Path
    source: str
    tree: ast.Module
    module: ModuleType
    Model: type[nn.Module]
    get_inputs: Callable[[], Any]
    get_init_inputs: Callable[[], Any]

    @property
    def namespace(self) -> Mapping[str, Any]:
        return vars(self.module)

    def instantiate(
        self, seed: int = SEED, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Instance:
        """Returns a new model and inputs.

        As the public judge does, it calls `torch.manual_seed(seed)` three times: before `get_init_inputs`, before
        the constructor and before `get_inputs`; then it moves model and inputs to the device.

        dtype: what floating parameters, buffers and inputs are cast to; None leaves them. device: None means the GPU
        if there is one, else the CPU. Raises ModelFileError, MixedDevices, or EagerFailure where the file's own code
        raises.
        """
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = self.build(seed)
        inputs = self.inputs(seed)
        return Instance(model.to(device=target, dtype=dtype), _moved(inputs, target, dtype))

    def build(self, seed: int | None = None) -> nn.Module:
        """Returns `Model(*get_init_inputs())`, seeding before each of the two calls unless `seed` is None."""
        _seed(seed)
        with self._eager("get_init_inputs raises"):
            values = self.get_init_inputs()
        if not isinstance(values, list | tuple):
            raise self._wrong(
                "get_init_inputs", f"get_init_inputs returns {_kind(values)}; let it return a list, [] for no arguments"
            )
        self._check_signature(values)
        _seed(seed)
        with self._eager("the constructor of Model raises"):
            model = self.Model(*values)
        devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
        if "meta" in devices:
            raise MixedDevices(
                f"{self.path}: parameters or buffers of the model are on meta, without values; fill them"
            )
        if len(devices) > 1:
            raise MixedDevices(f"{self.path}: the model's parameters live on {_names(devices)}; put them all on one")
        return model

    def inputs(self, seed: int | None = None) -> list[Any]:
        """Returns `get_inputs()` as a list, where the file puts them, after seeding unless `seed` is None."""
        _seed(seed)
        with self._eager("get_inputs raises"):
            values = self.get_inputs()
        if not isinstance(values, list | tuple):
            raise self._wrong(
                "get_inputs", f"get_inputs returns {_kind(values)}; let it return a list of the model's arguments"
            )
        for path, leaf in pytree.tree_flatten_with_path(list(values))[0]:
            if not isinstance(leaf, Tensor | int | float | None):
                where = "get_inputs()" + pytree.keystr(path)
                raise self._wrong("get_inputs", f"{where} is {_kind(leaf)}; it must be a tensor or a number")
        devices = {str(leaf.device) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
        where = self._at(self._line("get_inputs"))
        if "meta" in devices:
            raise MixedDevices(f"{where}: tensors of get_inputs are on meta, without values; fill them")
        if len(devices) > 1:
            raise MixedDevices(f"{where}: the tensors of get_inputs live on {_names(devices)}; put them all on one")
        return list(values)

    def run(self, instance: Instance, dtype: torch.dtype | None = None) -> Any:
        """Returns what the model gives in eager mode, without gradients. Raises EagerFailure with its own error.

        dtype: what the instance was cast to, for that message: the file may be right, and not so in that dtype.
        """
        cast = "" if dtype is None else f", cast to {str(dtype).removeprefix('torch.')},"
        with self._eager(f"the model{cast} fails in eager mode"), torch.no_grad():
            return instance.model(*instance.inputs)

    def place_of_forward(self) -> str:
        """The file and the line of Model's last `forward`, of its class where it has none, for a message."""
        line = self._line("Model")
        classes = [n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.lineno == line]
        methods = [n.lineno for c in classes for n in c.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
        return self._at(methods[-1] if methods else line)

    def _check_signature(self, values: Sequence[Any]) -> None:
        try:
            inspect.signature(self.Model).bind(*values)
        except TypeError as error:
            given = f"{len(values)} value{'s' * (len(values) != 1)}"
            takes = f"Model{inspect.signature(self.Model)}"
            what = f"the constructor is {takes}, but get_init_inputs gives {given}: {error}"
            raise self._wrong("Model", f"{what}; let get_init_inputs return one value for each argument") from None

    @contextmanager
    def _eager(self, what: str) -> Iterator[None]:
        """Runs code of the file; whatever it raises becomes EagerFailure, which shows that error and its line."""
        try:
            with without_gpu(), _in_folder_of(self.module):
                yield
        except BaseException as error:
            raise EagerFailure(_raised(self.path, self.module, self.source, what, error)) from error

    def _wrong(self, name: str, what: str) -> ModelFileError:
        return ModelFileError(f"{self._at(self._line(name))}: {what}")

    def _at(self, line: int | None) -> str:
        return f"{self.path}:{line}" if line else str(self.path)

    def _line(self, name: str) -> int | None:
        """The line of the last top-level definition of `name`."""
        definitions = (ast.ClassDef, ast.FunctionDef)
        return next((n.lineno for n in reversed(self.tree.body) if isinstance(n, definitions) and n.name == name), None)


def load(path: str | Path, settings: Mapping[str, object] | None = None, name: str = "Model") -> ModelFile:
    """Runs a model file, and nothing else: no folder is added to Python's path, and what it prints is printed.

    settings: module-level constant → the value to assign instead, before the file runs. name: of the model's class.
    Where there is no GPU, what the file puts on `cuda` lies on the CPU. Raises ModelFileError, or UnknownSetting.
    """
    path = Path(path)
    source = _read(path)
    tree = _parse(path, source)
    if settings:
        source = _with_settings(path, source, tree, settings)
        tree = _parse(path, source)
    module = _run(path, source, tree)
    for wanted in (name, *FUNCTIONS):
        if not hasattr(module, wanted):
            raise ModelFileError(f"{path}: there is no {_missing(wanted, module)}")
    model = getattr(module, name)
    loaded = ModelFile(path, source, tree, module, model, module.get_inputs, module.get_init_inputs)
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise loaded._wrong(name, f"{name} is no subclass of torch.nn.Module; let it be one, with its own forward")
    for wanted in FUNCTIONS:
        if not callable(getattr(module, wanted)):
            raise loaded._wrong(wanted, f"{wanted} is {_kind(getattr(module, wanted))}; let it be a function")
    return loaded


def load_candidate(path: Path, settings: Mapping[str, object] | None = None) -> ModelFile:
    """Loads a file that is compared with the model's own, with those of the settings that it has a constant for.

    Its class is ModelNew, never Model: a copy of the reference would be found correct. Raises ModelFileError.
    """
    known = constants(_parse(path, _read(path)))
    return load(path, {n: value for n, value in (settings or {}).items() if n in known}, "ModelNew")


def parse_setting(text: str) -> tuple[str, object]:
    """Reads "NAME=VALUE", where VALUE is a Python literal, as the command line takes it. Raises UnknownSetting."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise UnknownSetting(f"{text!r} is no setting; write NAME=VALUE, such as batch_size=64")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        hint = "a number, True, None, a tuple, or a text in quotes"
        raise UnknownSetting(f"cannot set {name.strip()}: {value!r} is no Python literal ({hint})") from None


def constants(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """Returns module-level name → the literals assigned to it, such as `n, k = 64, 8`: what settings replace."""
    found: dict[str, list[ast.expr]] = {}
    for name, value in _assignments(tree):
        try:
            ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        found.setdefault(name, []).append(value)
    return found


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            yield from _pairs(node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from _pairs(node.target, node.value)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names in `target` and what each is assigned, also in `a, b = 1, 2`."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
        starred = any(isinstance(e, ast.Starred) for e in (*target.elts, *value.elts))
        if len(target.elts) == len(value.elts) and not starred:
            for element, part in zip(target.elts, value.elts, strict=True):
                yield from _pairs(element, part)


def _with_settings(path: Path, source: str, tree: ast.Module, settings: Mapping[str, object]) -> str:
    """Returns the text with other literals in the place of those that `settings` names; no line moves."""
    known = constants(tree)
    edits: list[tuple[int, int, str]] = []
    lines = source.encode().split(b"\n")
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
    for name, value in settings.items():
        if name not in known:
            raise UnknownSetting(f"{path} {_no_constant(name, tree, known)}")
        text = _literal(name, value)
        for node in known[name]:
            last = node.end_lineno or node.lineno
            newlines = "\n" * (last - node.lineno)
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[last - 1] + (node.end_col_offset or 0)
            edits.append((begin, end, f"({newlines}{text})" if newlines else text))
    result = source.encode()
    for begin, end, text in sorted(edits, reverse=True):
        result = result[:begin] + text.encode() + result[end:]
    return result.decode()


def _no_constant(name: str, tree: ast.Module, known: Mapping[str, list[ast.expr]]) -> str:
    listed = ", ".join(f"{n} = {_short(ast.unparse(values[-1]))}" for n, values in known.items())
    has = f"its constants are {listed}" if listed else "it has no constants, such as a line `batch_size = 64`"
    computed = [value for n, value in _assignments(tree) if n == name]
    if computed:
        return f"computes {name} ({_short(ast.unparse(computed[-1]))}), and only a literal can be set; {has}"
    return f"has no constant {name!r} to set; {has}"


def _literal(name: str, value: object) -> str:
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise UnknownSetting(f"cannot set {name} to {_short(text)}: it cannot be written as a Python literal")
    return text


def _read(path: Path) -> str:
    try:
        contents = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path}: this is a folder; name the .py file in it") from None
    except OSError as error:
        raise ModelFileError(f"{path}: the file cannot be read ({error.strerror})") from None
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(contents).readline)
    except SyntaxError:  # it is not UTF-8, or declares what there is not
        encoding = "utf-8-sig"
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        name = "UTF-8" if encoding.startswith("utf-8") else encoding
        raise ModelFileError(f"{path}:{line}: the file is not {name} text; save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _DECLARATION.sub(r"\1utf-8", text)  # for it will be written in that


def _parse(path: Path, source: str) -> ast.Module:
    try:
        tree = ast.parse(source)
        compile(tree, str(path), "exec", dont_inherit=True)  # finds more, such as a return outside a function
        return tree
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else str(path)
        shown = f"\n    {source.split(chr(10))[error.lineno - 1].strip()}" if error.lineno else ""
        raise ModelFileError(f"{where}: this is not Python: {error.msg}{shown}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise ModelFileError(f"{path}: this is not Python: {str(error) or 'it is nested too deeply'}") from None


def _run(path: Path, source: str, tree: ast.Module) -> ModuleType:
    """Executes the file in a module of its own, which dataclasses and pickle find under its name."""
    name = f"fusewright_model_file_{next(_serial)}"
    module = ModuleType(name)
    module.__file__ = str(path.absolute())
    sys.modules[name] = module
    try:
        with without_gpu(), _in_folder_of(module):
            exec(compile(tree, module.__file__, "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        del sys.modules[name]
        what = "the file raises when it is run"
        if isinstance(error, ModuleNotFoundError):
            what = "the file imports what is not installed (files beside it are not found: a model file stands alone)"
        raise ModelFileError(_raised(path, module, source, what, error)) from error
    return module


@contextmanager
def _in_folder_of(module: ModuleType) -> Iterator[None]:
    """Runs code of a file where its own `os.chdir` has led; the paths that we were given are relative to another."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(_folders.get(module, "."))
        yield
        _folders[module] = os.getcwd()
    finally:
        os.fchdir(here)
        os.close(here)


def _missing(name: str, module: ModuleType) -> str:
    if name == "get_inputs":
        return "get_inputs(); define it to return the list of the model's arguments"
    if name == "get_init_inputs":
        return "get_init_inputs(); define it to return the list of the constructor's arguments, [] for none"
    classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
    have = f" (the file defines {', '.join(classes)})" if classes else ""
    return f"class {name}{have}; name the module {name}"


def _raised(path: Path, module: ModuleType, source: str, what: str, error: BaseException) -> str:
    """Says what was raised, and where in the file: the innermost of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
    line = lines[-1] if lines else None
    where = f"{path}:{line}" if line else str(path)
    shown = f"\n    {source.split(chr(10))[line - 1].strip()}" if line else ""
    return f"{where}: {what}: {raised(error)}{shown}\nMake the file run in plain PyTorch first."


def _moved(values: list[Any], device: torch.device, dtype: torch.dtype | None) -> list[Any]:
    """Returns the inputs on `device`, floating ones as `dtype`; a tensor that is there twice stays one tensor."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            to = tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
            moved[id(tensor)] = to.requires_grad_(tensor.requires_grad)
        return moved[id(tensor)]

    result: list[Any] = pytree.tree_map_only(Tensor, move, values)
    return result


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _names(devices: set[str]) -> str:
    return " and ".join(sorted(devices))


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
