"""torch's process-wide settings, which a candidate must leave as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def torch_flags() -> dict[str, str]:
    """torch's process-wide settings by name; one that cannot be read has the reason as its value."""
    b = torch.backends
    readers: dict[str, Callable[[], Any]] = {
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision,
        "torch.get_default_dtype()": torch.get_default_dtype,
        "torch.get_num_threads()": torch.get_num_threads,
        "torch.is_grad_enabled()": torch.is_grad_enabled,
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled,
        "torch.is_autocast_enabled('cuda')": lambda: torch.is_autocast_enabled("cuda"),
        "torch.is_autocast_enabled('cpu')": lambda: torch.is_autocast_enabled("cpu"),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled,
        "flushing of denormals": lambda: float(torch.full((64,), 1e-40) * torch.full((64,), 0.5)[0]) == 0.0,
        "current CUDA stream": lambda: torch.cuda.current_stream().cuda_stream if _initialised() else 0,
        "current CUDA device": lambda: torch.cuda.current_device() if _initialised() else 0,
    }
    for name, owner, attribute in (
        ("torch.backends", b, "fp32_precision"),
        ("torch.backends.cuda.matmul", b.cuda.matmul, "fp32_precision"),
        ("torch.backends.cuda.matmul", b.cuda.matmul, "allow_tf32"),
        ("torch.backends.cuda.matmul", b.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        ("torch.backends.cuda.matmul", b.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        ("torch.backends.cuda.matmul", b.cuda.matmul, "allow_fp16_accumulation"),
        ("torch.backends.cudnn", b.cudnn, "allow_tf32"),
        ("torch.backends.cudnn", b.cudnn, "benchmark"),
        ("torch.backends.cudnn", b.cudnn, "deterministic"),
        ("torch.backends.cudnn", b.cudnn, "enabled"),
        ("torch.backends.mkldnn", b.mkldnn, "enabled"),
        ("torch.backends.mkldnn", b.mkldnn, "fp32_precision"),
    ):
        readers[f"{name}.{attribute}"] = lambda owner=owner, attribute=attribute: getattr(owner, attribute)  # type: ignore[misc]
    return {name: _reading(read) for name, read in readers.items()}


def _initialised() -> bool:
    """Until a first use of CUDA, which is no switch, the stream is the default one and the device the first."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _reading(read: Callable[[], Any]) -> str:
    try:
        return str(read())
    except Exception as error:
        return type(error).__name__
