"""What the public judge's static check rejects, written anew from its description, and stricter."""

from __future__ import annotations

import ast
import re

FORBIDDEN = {
    "try, except or pass, even in a comment": r"\b(try|except|pass)\b",
    "threads or processes": r"\b(threading|multiprocessing|concurrent\.futures|\w+PoolExecutor)\b",
    "streams": r"cuda\.Stream\b|cuda\.stream\b|\.(wait|record)_stream\b",
    "timer patching": r"\b(Event|record|elapsed_time|synchronize|perf_counter|time\.time)\s*=[^=]",
    "tensor subclasses": r"_make_subclass|Tensor\.__new__|class\s+\w+\([^)]*\bTensor\)",
    "cuBLAS or cuDNN": r"\b(cublas|cudnn)",
    "layers written out in full": r"torch\.nn\.(?!Module\b|Parameter|ModuleList\b|ModuleDict\b|init\b)\w+\.?\w*\(",
}
REQUIRED = ("__global__", "load_inline")

# What the C++ may use of ATen: memory and metadata, nothing that computes.
ATEN = {
    *("Tensor", "TensorOptions", "IntArrayRef", "ScalarType", "GradMode", "AutoDispatchBelowADInplaceOrView"),
    *("empty_strided", "empty_strided_symint", "MemoryFormat"),
    *("kFloat", "kDouble", "kHalf", "kBFloat16", "kBool", "kByte", "kChar", "kShort", "kInt", "kLong"),
}


def complaints(text: str) -> list[str]:
    """Why the judge would reject a file, or warn about it. Comments count too, but for those of its first lines."""
    found = [f"{what}: {m[0]!r}" for what, pattern in FORBIDDEN.items() if (m := re.search(pattern, text))]
    found += [f"lacks {word}" for word in REQUIRED if word not in text]
    found += [f"ATen computes: at::{name}" for name in sorted(set(re.findall(r"\bat::(\w+)", text)) - ATEN)]
    return found + [f"forward calls {name}" for name in called_in_forward(text)]


def called_in_forward(text: str) -> list[str]:
    """What ModelNew's forward calls, besides our operator and the error that it raises."""
    model = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "ModelNew")
    forward = next(n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    calls = [ast.unparse(n.func) for n in ast.walk(forward) if isinstance(n, ast.Call)]
    ours = re.compile(r"torch\.ops\.fusewright_\w+\.(fused|frozen)|ValueError")
    return [c for c in calls if not ours.fullmatch(c)]
