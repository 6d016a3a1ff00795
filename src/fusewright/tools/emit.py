"""Door 2: writes a model file whose class runs our kernels. One file, which torch builds without us."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusewright import __version__
from fusewright.capture.model import CapturedModel, OutputIndex, member, undecorated
from fusewright.capture.model_file import ModelFile
from fusewright.chip import Chip
from fusewright.errors import CannotCapture, NoKernel, UnsupportedDtype
from fusewright.fusion.plan import View
from fusewright.runtime.nvrtc import DEVICE_CODE
from fusewright.tools import freeze
from fusewright.tools.host import AT_TYPES, HostPrinter, Kernels, meta_function, tensor_inputs
from fusewright.tools.model_source import ModelSource, split
from fusewright.tools.planned import Planned, plan_model


@dataclass(frozen=True)
class Emitted:
    """The plans behind a written file, and its text. frozen: the plans that `freeze` adds, if there is what to keep."""

    planned: tuple[Planned, ...]
    frozen: tuple[Planned, ...]
    text: str


def emit(
    file: ModelFile,
    model: nn.Module,
    captured: CapturedModel,
    chip: Chip,
    *,
    library: bool,
    dtype: torch.dtype | None = None,
) -> Emitted:
    """Returns the text of the new file. dtype: what the model and its inputs were cast to, if anything.

    Raises UnsupportedDtype, NoKernel for an operator without a kernel unless `library` allows torch's, CannotCapture
    for a structure that cannot be written.
    """
    planned = plan_model(captured, chip, library=library)
    for buffer in (b for p in planned for b in p.plan.buffers.values()):
        if buffer.dtype not in AT_TYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in AT_TYPES)
            raise UnsupportedDtype(f"{buffer.name} is {str(buffer.dtype).removeprefix('torch.')}; kernels take {known}")
    if any(f.makes for p in planned for f in p.plan.fallbacks):
        raise NoKernel("forward makes a tensor, which a written file cannot hold; let the constructor make it a buffer")
    missing = {(f.name, f.reason): p.name for p in reversed(planned) for f in p.plan.fallbacks}
    if missing and not library:
        # What backward alone has, such as the `cat` of a `chunk`, is not to be found in the user's file.
        listed = sorted(f"{n} ({why}{', in backward' * (graph == 'backward')})" for (n, why), graph in missing.items())
        raise NoKernel(
            f"no kernel for {', '.join(listed)}; let torch's library compute what has none with --allow-library, "
            'or run the model in process: torch.compile(model, backend="fusewright")'
        )
    made_for = chip.arch if dtype is None else f"{chip.arch}, model and inputs cast to {str(dtype).split('.')[1]}"
    source = split(file.source, file.tree)
    code = getattr(undecorated(type(model).forward), "__code__", None)
    if code is None or code.co_firstlineno != source.line:
        raise CannotCapture(
            "a call runs something else than the forward of class Model, such as a decorator of it, which the written "
            "file would apply to the kernels too; do that within forward"
        )
    added = freeze.graphs(planned[0], captured, model, source, chip)
    return Emitted(planned, added, _file(file, model, captured, source, planned, added, chip, made_for))


# ---- the file


def _file(
    file: ModelFile,
    model: nn.Module,
    captured: CapturedModel,
    source: ModelSource,
    planned: Sequence[Planned],
    added: Sequence[Planned],
    chip: Chip,
    made_for: str,
) -> str:
    for expression in captured.arguments:
        if expression and re.split(r"\W", expression)[0] not in (*source.arguments, *vars(file.module)):
            raise CannotCapture(
                f"forward reads {expression}, which the written file could not; "
                "make it a buffer, an input or a plain Python number"
            )
    kernels = Kernels()
    every = (*planned, *added)
    functions = [HostPrinter(_function(p), p.plan, p.programs, kernels, p.name == "backward").print() for p in every]
    sources = {"cuda": _cuda_source(kernels), "host": _host_source(kernels, functions, every, captured)}
    digest = hashlib.sha256("\n".join(sources.values()).encode()).hexdigest()[:12]
    stem = re.sub(r"[^0-9A-Za-z_]", "_", file.path.stem)[:100]  # torch builds it in a folder of that name
    space = f"fusewright_{stem}_{digest}"
    generated = _GENERATED.format(
        version=__version__,
        name=_in_comment(file.path.name),
        made_for=made_for,
        **{name: text.replace("FUSEWRIGHT_NAMESPACE", space) for name, text in sources.items()},
        space=space,
        imports=_imports(source.before),
        **_build(planned, chip),
    )
    forward = _forward(model, captured, space, source, added)
    body = f"{source.head}{forward}{freeze.methods(planned[0], added, captured, space, source)}{source.tail}"
    return f"{source.before.rstrip()}\n\n{generated}\n\n{body}{source.after}"


def _in_comment(name: str) -> str:
    """A file's name may hold line ends, which would end the comment, and bytes that are no text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _imports(before: str) -> str:
    imports = [node for node in ast.parse(before).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    there = {
        (getattr(node, "module", None), a.name) for node in imports for a in node.names if a.asname in (None, a.name)
    }
    lines = [] if (None, "torch") in there else ["import torch"]
    if ("torch.utils.cpp_extension", "load_inline") not in there:
        lines.append("from torch.utils.cpp_extension import load_inline")
    return "\n".join([*lines, "", ""]) if lines else ""


_GENERATED = '''{imports}# Written by fusewright {version} from {name} for {made_for}:
# the kernels that ModelNew runs, and below them the code that launches them.
CUDA_SOURCE = r"""
{cuda}
"""

# Compiled apart, so that nvcc reads nothing of torch, which takes it far longer than the kernels do.
CPP_SOURCE = r"""
{host}
"""

if torch.cuda.is_available():  # without a GPU the file can be imported and read, and its models built, but not run
{right_chip}    load_inline(
        name="{space}",
        cpp_sources=CPP_SOURCE,
        cuda_sources=CUDA_SOURCE,
        extra_cflags=["-O2"],
        extra_cuda_cflags=[
            "-O3",
            "--fmad=false",  # a product and a sum round apart, as in eager
            "-U__CUDA_NO_HALF_CONVERSIONS__",  # torch turns these conversions off; the kernels use them
            "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
{chip_flags}        ],
        is_python_module=False,
        no_implicit_headers=True,
    )
'''

# Where the kernels use instructions that one architecture alone has.
_RIGHT_CHIP = """    if torch.cuda.get_device_capability() != {capability}:
        raise RuntimeError(
            "these kernels are for {arch} ({name}), and the GPU here is another: write the file again on this machine, "
            "or with `fusewright optimize --arch` for this GPU"
        )
"""
_CHIP_FLAGS = """            "-gencode=arch=compute_{number},code=sm_{number}",
"""


def _build(planned: Sequence[Planned], chip: Chip) -> dict[str, str]:
    """Kernels that run everywhere are built for the GPU at hand, as `load_inline` does by itself."""
    launches = (launch for p in planned for program in p.programs.values() for launch in program.launches)
    if not any(launch.tensor_maps for launch in launches):
        return {"right_chip": "", "chip_flags": ""}
    number = chip.arch.removeprefix("sm_")
    capability = divmod(int(number.rstrip("a")), 10)
    return {
        "right_chip": _RIGHT_CHIP.format(capability=capability, arch=chip.arch, name=chip.name),
        "chip_flags": _CHIP_FLAGS.format(number=number),
    }


def _cuda_source(kernels: Kernels) -> str:
    """What nvcc compiles: our headers, each once and after those that it includes, then the kernels.

    All of it is in a namespace of this file's name, so that two written files can be loaded side by side.
    """
    headers, system = _headers(kernels.headers)
    titled = [f"// ======== {_TITLES[f]}\n\n" + "\n\n".join(texts) for f, texts in kernels.texts.items()]
    return _source(
        [*kernels.includes, *system, "cstdint", "cstring"], [*headers, *titled, _text("emitted_overlap.hpp")]
    )


_INCLUDES = (
    *("ATen/core/Tensor.h", "ATen/ops/empty_strided.h"),
    *("c10/cuda/CUDAException.h", "c10/cuda/CUDAGuard.h", "c10/cuda/CUDAStream.h", "torch/library.h"),
    *("cuda_runtime.h", "algorithm", "cstdint", "string", "vector"),
)


def _host_source(
    kernels: Kernels, functions: Sequence[str], planned: Sequence[Planned], captured: CapturedModel
) -> str:
    """What the host's compiler does, in the same namespace: the kernels' declarations, and the code around them."""
    parts, includes = _host_parts(functions, planned, captured)
    declared = "\n".join([*kernels.declarations, "bool can_overlap();"])
    if "TensorMap" in declared:
        declared = f"namespace fusewright {{ {_TENSOR_MAP} }}\n{declared}"
    inside = [
        f"// ======== the kernels, which are in CUDA_SOURCE\n\n{declared}",
        "namespace {",
        *parts,
        "}  // namespace",
        _registration(planned),
    ]
    return _source([*_INCLUDES, *includes, *kernels.operators], inside)


# As sm90_ptx.cuh has it.
_TENSOR_MAP = "struct alignas(64) TensorMap { unsigned char opaque[128]; };"


def _source(includes: Sequence[str], parts: Sequence[str]) -> str:
    lines = "\n".join(f"#include <{i}>" for i in dict.fromkeys(includes))
    inside = "\n\n".join(part.strip() for part in parts)
    return f"{lines}\n\nnamespace FUSEWRIGHT_NAMESPACE {{\n\n{inside}\n\n}}  // namespace FUSEWRIGHT_NAMESPACE"


_TITLES = {
    "fusewright_fused": "inference",
    "fusewright_forward": "forward, in training: also stores what backward needs",
    "fusewright_backward": "backward",
    "fusewright_split": "freeze: the halves of parameters",
    "fusewright_frozen": "inference with halves of parameters that are there",
}


def _function(planned: Planned) -> str:
    return f"fusewright_{planned.name}"


def _headers(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts of our headers, each once and after those that it includes; the system headers that they include."""
    texts: dict[str, str] = {}
    system: list[str] = []

    def collect(name: str) -> None:
        if name in texts:
            return
        text = (DEVICE_CODE / name).read_text()
        text = re.sub(r"^#ifdef .*?^#else\n(.*?)^#endif\n", r"\1", text, flags=re.DOTALL | re.MULTILINE)  # see below
        for include in re.finditer(r'^#include (?:"(\S+)"|<(\S+)>)', text, re.MULTILINE):
            if include[1]:
                collect(include[1])
            else:
                system.append(include[2])
        lines = [line for line in text.split("\n") if not re.match(r"#pragma once|#include ", line)]
        texts[name] = f"// ======== {name}\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    # What is under #ifdef is for NVRTC or for debugging; a file has what is under #else.
    for name in dict.fromkeys(names):
        collect(name)
    return list(texts.values()), system


def _host_parts(
    functions: Sequence[str], planned: Sequence[Planned], captured: CapturedModel
) -> tuple[list[str], list[str]]:
    """The code around the kernels; the headers that it needs beside those that all files do."""
    parts, includes = [_text("emitted_host.hpp")], []
    metas = [meta_function(_function(p), p.plan, conditional=p.name == "backward") for p in planned]
    calls = "\n".join(functions)
    if "= tensor_map(" in calls:
        parts.append(_text("emitted_tensor_map.hpp"))
        includes.append("cuda.h")
    includes += [header for type, header in _HALVES.items() if type in calls]
    parts += [*functions, *metas]
    if _trains(planned):
        parts += [_autograd(planned, captured), *(freeze.autograd(p.plan) for p in planned if p.name == "frozen")]
        includes.append("torch/csrc/autograd/custom_function.h")
    return parts, includes


_HALVES = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}


def _trains(planned: Sequence[Planned]) -> bool:
    return any(p.name == "backward" for p in planned)


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


def _schema(planned: Planned) -> str:
    arguments = [f"Tensor {b.name}" for b in tensor_inputs(planned.plan)]
    if planned.name == "backward":
        return f"backward({', '.join([*arguments, 'int[] wanted'])}) -> Tensor[]"
    count = sum(isinstance(o, View) for o in planned.plan.outputs)
    result = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return f"{planned.name}({', '.join(arguments)}) -> {result}"


def _registration(planned: Sequence[Planned]) -> str:
    names = [p.name for p in planned]
    definitions = "\n".join(f'    library.def("{_schema(p)}");' for p in planned)
    parts = [f"TORCH_LIBRARY(FUSEWRIGHT_NAMESPACE, library) {{\n{definitions}\n}}"]
    for key, suffix in (("CUDA", ""), ("Meta", "_meta")):
        lines = "\n".join(f'    library.impl("{n}", fusewright_{n}{suffix});' for n in names)
        parts.append(f"TORCH_LIBRARY_IMPL(FUSEWRIGHT_NAMESPACE, {key}, library) {{\n{lines}\n}}")
    if _trains(planned):
        differentiated = [n for n in names if n in ("fused", "backward", "frozen")]
        lines = "\n".join(f'    library.impl("{n}", {n}_autograd);' for n in differentiated)
        parts.append(f"TORCH_LIBRARY_IMPL(FUSEWRIGHT_NAMESPACE, Autograd, library) {{\n{lines}\n}}")
    return "\n\n".join(parts)


def _autograd(planned: Sequence[Planned], captured: CapturedModel) -> str:
    """The autograd function: the forward graph, what it saves, and the backward graph."""
    inference, forward, backward = planned[:3]
    inputs = [b.name for b in tensor_inputs(inference.plan)]
    parameters = ", ".join(f"const at::Tensor& {n}" for n in inputs)
    count = len(forward.graph.outputs)
    results = [f"std::get<{i}>(results)" for i in range(count)] if count > 1 else ["results"]
    arguments: list[str] = []
    saved: list[str] = []
    tensors = [i for i, n in enumerate(inference.graph.inputs) if n.op != "size"]
    for origin in captured.saved:
        if origin.kind == "gradient":
            arguments.append(f"gradients[{origin.index}]")
        elif origin.kind != "size":
            kept = inputs[tensors.index(origin.index)] if origin.kind == "argument" else results[origin.index]
            arguments.append(f"saved[{len(saved)}]")
            saved.append(kept)
    wanted = [tensors.index(i) for i, o in enumerate(backward.graph.outputs) if o is not None]
    outputs = captured.outputs
    several = outputs > 1
    type = "at::Tensor" if not several else f"std::tuple<{', '.join(['at::Tensor'] * outputs)}>"
    return _text("emitted_autograd.hpp").format(
        parameters=parameters,
        names=", ".join(inputs),
        saved=", ".join(saved),
        returned="torch::autograd::variable_list" if several else "at::Tensor",
        wrap=_braced(results[:outputs]) if several else results[0],
        count=len(inputs),
        places=", ".join(str(i) for i in wanted),
        arguments=", ".join(arguments),
        type=type,
        result=_braced([f"outputs[{i}]" for i in range(outputs)]) if several else "outputs",
        backward_parameters=", ".join(f"const at::Tensor& {b.name}" for b in tensor_inputs(backward.plan)),
        backward_names=", ".join(b.name for b in tensor_inputs(backward.plan)),
        any_grad=" || ".join(f"{n}.requires_grad()" for n in inputs),
        any_backward_grad=" || ".join(f"{b.name}.requires_grad()" for b in tensor_inputs(backward.plan)),
    )


def _braced(items: Sequence[str]) -> str:
    return "{" + ", ".join(items) + "}"


# ---- the class


def _forward(
    model: nn.Module, captured: CapturedModel, space: str, source: ModelSource, added: Sequence[Planned]
) -> str:
    """The body of `forward`: checks the constants that the kernels were made for, calls the operator."""
    arguments = ", ".join(e for e in captured.arguments if e is not None)
    calls = {"fused": f"torch.ops.{space}.fused({arguments})"}
    if added:
        calls["frozen"] = f"torch.ops.{space}.frozen({arguments}, *{source.arguments[0]}._halves)"
    lines = []
    attributes = {f"{source.arguments[0]}{name}": value for name, value in _constants(model).items()}
    constants = attributes | {
        name: value for name, value in captured.constants.items() if value is None or _plain(value)
    }
    if constants:
        names, values = list(constants), [_literal(v) for v in constants.values()]
        shown = [name.removeprefix(f"{source.arguments[0]}.") for name in names]
        wanted = ", ".join(f"{name} = {value}" for name, value in zip(shown, values, strict=True))
        message = json.dumps(f"these kernels were written for {wanted}", ensure_ascii=False)
        lines += [f"if {_listed(names)} != {_listed(values)}:", f"    raise ValueError({message})"]
    result = captured.result
    if isinstance(result, OutputIndex) and captured.outputs == 1:
        given = {name: f"return {call}" for name, call in calls.items()}
    else:
        given = {name: f"out = {call}" if captured.outputs > 1 else f"out = ({call},)" for name, call in calls.items()}
    if added:
        lines += [f"if {source.arguments[0]}._halves:", f"    {given['frozen']}", "else:", f"    {given['fused']}"]
    else:
        lines.append(given["fused"])
    if not given["fused"].startswith("return"):
        lines.append(f"return {_structure(result)}")
    return "".join(f"{source.indent}{line}\n" for text in lines for line in text.split("\n"))


def _listed(items: Sequence[str]) -> str:
    """A list display, one item a line where it is long."""
    line = f"[{', '.join(items)}]"
    return line if len(line) <= 48 else "[\n" + "".join(f"    {item},\n" for item in items) + "]"


def _structure(value: Any) -> str:
    if isinstance(value, OutputIndex):
        return f"out[{value.index}]"
    if isinstance(value, tuple) and type(value) is tuple:
        return "(" + "".join(f"{_structure(v)}, " for v in value) + ")"
    if type(value) is list:
        return "[" + ", ".join(_structure(v) for v in value) + "]"
    if type(value) is dict:
        return "{" + ", ".join(f"{k!r}: {_structure(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise CannotCapture(f"the model returns a {type(value).__name__}; return tensors, tuples, lists or dicts")


_LONGEST = 400  # characters of an attribute that is checked; a longer one is no setting


def _literal(value: Any) -> str:
    """The Python that gives a plain value."""
    if type(value) is float and math.isinf(value):
        return f'float("{value}")'
    if type(value) is list:
        return f"[{', '.join(map(_literal, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {_literal(v)}" for key, v in value.items()) + "}"
    return repr(value)


def _plain(value: Any) -> bool:
    """Whether it is numbers and texts alone, perhaps in containers; NaN is not equal to itself."""
    if type(value) in (tuple, list):
        return all(map(_plain, value))
    if type(value) is dict:
        return all(map(_plain, (*value, *value.values())))
    return type(value) in (bool, int, str) or (type(value) is float and not math.isnan(value))


def _constants(model: nn.Module) -> dict[str, Any]:
    """Plain values in the modules' attributes: kernels hold them as constants, so they must not change unnoticed."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):  # the shapes of its parameters are checked
            continue
        prefix, parent = "", model
        for name in filter(None, path.split(".")):
            prefix += member(parent, name)
            parent = parent.get_submodule(name)
        for name, value in vars(module).items():
            if name.startswith("_") or name in ("training", "inplace"):
                continue
            if _plain(value) and len(repr(value)) <= _LONGEST:
                found[f"{prefix}.{name}"] = value
    return found
