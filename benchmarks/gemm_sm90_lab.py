"""Lab bench of `gemm_sm90.cuh`: checks configurations against float64, then times them beside torch's products.

    python benchmarks/gemm_sm90_lab.py compile           compile every configuration, print what the compiler says
    python benchmarks/gemm_sm90_lab.py run OUT.jsonl     on a GPU: check and time, one JSON object a line

Each experiment runs in a forked worker that is killed, and replaced, when a kernel hangs. `--only TEXT` selects.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "cuda")]

import torch  # noqa: E402
from sm90_host import SPLIT, Gemm, GemmConfig, Split  # noqa: E402

CUBINS = Path(os.environ.get("FUSEWRIGHT_LAB", ROOT / ".lab_sm90")) / "cubins"
HEADLINE = (1024, 8192, 8192)


def with_(config: GemmConfig, **changes: Any) -> GemmConfig:
    return GemmConfig(**{**asdict(config), **changes})


BF16 = GemmConfig(element="__nv_bfloat16", out="__nv_bfloat16", vector=8)
F16X1 = GemmConfig(scaled=True)
BF16_PING_PONG = with_(BF16, tile=(128, 128), stages=6, ping_pong=True)
F16X1_PING_PONG = with_(F16X1, tile=(128, 128), stages=6, ping_pong=True)
REGISTERS = GemmConfig(scaled=True, registers=True, stages=3, cluster=2)
F16X3 = GemmConfig(products=3, tile=(128, 128), stages=3, promote=32, scaled=True)


@dataclass(frozen=True)
class Experiment:
    """One configuration at some shapes. `timed`: the first shape is timed too."""

    name: str
    config: GemmConfig
    shapes: list[tuple[int, int, int]] = field(default_factory=lambda: [HEADLINE])
    timed: bool = True
    inputs: tuple[str, ...] = ("normal",)


# Ragged in every dimension; with several rounds of the ring and of the persistent loop; smaller than one tile.
SHAPES = [(256, 256, 256), (8, 8, 8), (304, 520, 1000), (1000, 3000, 72), (4104, 2056, 520)]


def experiments() -> Iterator[Experiment]:
    kinds = (
        ("bf16", BF16),
        ("f16x1", F16X1),
        ("f16x3", F16X3),
        ("bf16 ping-pong", BF16_PING_PONG),
        ("f16x1 ping-pong", F16X1_PING_PONG),
    )
    for name, config in kinds:
        for majors in (("K", "K"), ("K", "MN"), ("MN", "K"), ("MN", "MN")):
            for cluster in (1, 2):
                changed = with_(config, major_a=majors[0], major_b=majors[1], cluster=cluster)
                yield Experiment(f"{name} {majors} c{cluster} debug", changed.debug(), SHAPES, timed=False)
    for cluster in (1, 2):
        for label, config in kinds:
            yield Experiment(f"{label} c{cluster}", with_(config, cluster=cluster))
    for majors, shape, name in ((("K", "MN"), HEADLINE, "dX"), (("MN", "MN"), (8192, 8192, 1024), "dW")):
        for label, config in kinds:
            yield Experiment(f"{label} {name}", with_(config, major_a=majors[0], major_b=majors[1]), [shape])
    for label, config in kinds:
        yield Experiment(f"{label} 4096", config, [(4096, 4096, 4096)])
    for major in ("K", "MN"):  # of the weight, a; forward and dX
        for cluster in (1, 2):
            config = with_(REGISTERS, major_a=major, cluster=cluster)
            yield Experiment(f"registers {major} c{cluster} debug", config.debug(), SHAPES, timed=False)
            yield Experiment(f"registers {major} c{cluster}", config, [(8192, 1024, 8192)])
    for label, config in kinds:
        if config.scaled:
            changed = with_(config, by_line=(True, True))
            yield Experiment(f"{label} by line debug", changed.debug(), SHAPES, timed=False)
            yield Experiment(f"{label} by line", changed)
    changed = with_(REGISTERS, by_line=(False, True))
    yield Experiment("registers by line debug", changed.debug(), SHAPES, timed=False)
    yield Experiment("registers by line", changed, [(8192, 1024, 8192)])
    yield Experiment("registers 128", with_(REGISTERS, tile=(128, 128), stages=4), [(8192, 1024, 8192)])
    yield from tiles()
    yield from split_k()
    short = [(2048, 2048, k) for k in (128, 256, 512, 1024, 4096)]
    yield Experiment("f16x3 accuracy", F16X3, short, False, ("normal", "uniform"))


def tiles() -> Iterator[Experiment]:
    """The rate of each tile, and of bulk copies by how lines are aligned. Sizes fill waves of all tiles alike, or are
    those of the random sweep where it was slow; c2: pairs, which share what they read of B."""
    stages = {64: 8, 96: 7, 128: 6, 160: 5, 192: 4, 224: 4, 256: 4}
    plain = {f"128×{n}": with_(BF16, tile=(128, n), stages=s, vector=4 if n % 64 else 8) for n, s in stages.items()}
    plain["256×128"] = with_(BF16, tile=(256, 128), stages=4)
    plain["256×160"] = with_(BF16, tile=(256, 160), stages=4, vector=4)
    plain["128×128 ping-pong"] = BF16_PING_PONG
    full = (8448, 6720, 2048)  # 33 times 256; a multiple of 96, 160 and 224
    for name, config in plain.items():
        yield Experiment(f"tile {name} full", config, [full])
    for n, s in ((64, 4), (96, 3), (128, 3)):
        yield Experiment(f"tile f16x3 128×{n} full", with_(F16X3, tile=(128, n), stages=s), [full])
        yield Experiment(f"tile f16x3 128×{n} small", with_(F16X3, tile=(128, n), stages=s), [(672, 640, 1920)])
    for name in ("128×128 ping-pong", "128×96", "128×160", "128×192", "128×224", "256×160"):
        for shape in ((7296, 648, 3848), (7296, 648, 3840), (3328, 1536, 1960), (3328, 1536, 1920)):
            for cluster in (1, 2) if shape[2] % 64 else (1,):
                config = with_(plain[name], cluster=cluster)
                yield Experiment(f"tile {name} {shape[0]} {shape[2]} c{cluster}", config, [shape])
    for name in ("128×128 ping-pong", "128×256"):
        for k in (4096, 4104, 4112, 4128):  # lines at multiples of 128, 16, 32, 64 bytes
            for cluster in (1, 2):
                yield Experiment(
                    f"tile {name} K {k} c{cluster}", with_(plain[name], cluster=cluster), [(4096, 4096, k)]
                )


def split_k() -> Iterator[Experiment]:
    """Blocks that share K, and tiles that they compete with, where tiles are few: sizes of the random sweep."""
    stages = {"bf16": {64: 8, 96: 7, 128: 6, 192: 4}, "f16x3": {64: 4, 96: 3, 128: 3}}
    ways = {
        "bf16": ((64, 1, 1), (64, 1, 2), (128, 1, 1), (128, 2, 1), (128, 1, 2), (128, 2, 2)),
        "f16x3": ((64, 1, 1), (64, 1, 2), (96, 1, 1), (96, 1, 3), (128, 1, 1), (128, 1, 2), (128, 1, 4)),
    }
    shapes = [(768, 696, 4096), (851, 736, 6272), (1536, 600, 7800), (728, 1536, 6648), (1072, 2048, 5248)]
    for label, config in (("bf16", BF16), ("f16x3", F16X3)):
        for n, cluster, split in ways[label]:
            changed = with_(config, tile=(128, n), stages=stages[label][n], cluster=cluster, split_k=split, vector=4)
            yield Experiment(f"split-K {label} {n} c{cluster} s{split} debug", changed.debug(), SHAPES, timed=False)
            for shape in shapes:
                yield Experiment(f"split-K {label} {n} c{cluster} s{split} {shape}", changed, [shape])


# ---- Compiling ------------------------------------------------------------------------------------------------------


def compile_source(source: str) -> bytes:
    """Returns the cubin, from the lab's folder where it lies there. Prints what the compiler warns of."""
    headers = b"".join(path.read_bytes() for path in sorted((ROOT / "src/fusewright/cuda").glob("*.cuh")))
    path = CUBINS / (hashlib.sha256(source.encode() + headers).hexdigest()[:16] + ".cubin")
    if path.exists():
        return path.read_bytes()
    from cuda.bindings import nvrtc

    include = os.environ.get("CUDA_INCLUDE")
    if not include:
        from cuda.pathfinder import find_nvidia_header_directory

        include = find_nvidia_header_directory("cudart")
    options = ["--std=c++17", "--ptxas-options=-v", "--gpu-architecture=sm_90a", f"-I{ROOT}/src/fusewright/cuda"]
    options.append(f"-I{include}")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"lab.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode(errors="replace")
    if int(status) != 0:
        raise RuntimeError(text)
    for line in text.splitlines():
        if "Potential" in line or ("spill" in line and "0 bytes spill stores, 0 bytes spill loads" not in line):
            print("   ", line.strip())
    code = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code)
    return code


# ---- Measuring ------------------------------------------------------------------------------------------------------


def draw(kind: str, *shape: int) -> torch.Tensor:
    return (torch.rand if kind == "uniform" else torch.randn)(*shape, device="cuda")


def errors(result: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> dict[str, float]:
    """Relative Frobenius, largest componentwise (against |A|·|B|), and signed bias."""
    difference = result.double() - reference
    return {
        "frobenius": (difference.norm() / reference.norm()).item(),
        "componentwise": (difference.abs() / bound).max().item(),
        "bias": ((difference * reference.sign()).mean() / reference.abs().mean()).item(),
    }


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int = 25) -> dict[str, float]:
    """Median milliseconds of each, taken in turn, the L2 flushed before each."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for run in runs.values():
        run()
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in samples.items()}


class Bench:
    """An experiment's operands, at one shape: what the kernel reads and what torch reads."""

    def __init__(self, config: GemmConfig, shape: tuple[int, int, int], kind: str) -> None:
        self.config, (self.m, self.n, self.k) = config, shape
        x = draw(kind, self.m, self.k) if config.major_a == "K" else draw(kind, self.k, self.m)
        w = draw(kind, self.n, self.k) if config.major_b == "K" else draw(kind, self.k, self.n)
        self.exponents: tuple[Any, Any] = (None, None)
        if config.scaled:
            planes = 2 if config.products == 3 else 1
            (self.a, ea), (self.b, eb) = (self.split(*t, planes) for t in zip((x, w), config.by_line, strict=True))
            self.exponents = (ea, eb)
        else:
            dtype = torch.bfloat16 if config.element == "__nv_bfloat16" else torch.float16
            x, w = x.to(dtype), w.to(dtype)
            self.a, self.b = x, w
        self.x = x if config.major_a == "K" else x.T
        self.w = w.T if config.major_b == "K" else w
        out_dtype = {"float": torch.float32, "__nv_bfloat16": torch.bfloat16, "__half": torch.float16}[config.out]
        self.out = torch.full((self.m, self.n), float("nan"), dtype=out_dtype, device="cuda")
        if config.registers:
            self.a, self.out = x, self.out.T.contiguous()
        self.bias = torch.randn(self.out.shape[1], device="cuda")

    def split(self, x: torch.Tensor, by_line: bool, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
        split = Split(compile_source(SPLIT.format(planes=planes)), planes, by_line)
        halved = split.buffers(x)
        split.run(x, halved)
        data = halved.data
        expected = torch.ldexp(x.double(), halved.exponents)
        assert torch.equal(data[0], expected.float().half()), "hi"
        if planes == 2:
            residue = (expected - data[0].double() - data[1].double() * 2**-11).abs()
            assert (residue <= expected.abs() * 2.0**-22 + 2.0**-35).all(), "lo"
        assert torch.equal(halved.lines.view(torch.float32), x.abs().amax(1)), "magnitudes of lines"
        if not by_line:
            assert torch.equal(halved.columns.view(torch.float32), x.abs().amax(0)), "magnitudes of columns"
        self.split_run = lambda: split.run(x, halved)
        return data, halved.given

    def check(self, gemm: Gemm) -> dict[str, float]:
        zero = torch.zeros_like(self.bias)
        a64, b64 = self.x.double(), self.w.double()
        reference, bound = self.ordered(a64 @ b64), self.ordered(a64.abs() @ b64.abs())
        gemm.prepare(self.a, self.b, self.out, zero, 1.0, 1.0, self.exponents, self.k)()
        torch.cuda.synchronize()
        ours = errors(self.out, reference, bound)
        if self.config.products == 3 or self.config.scaled:
            torch.backends.cuda.matmul.allow_tf32 = self.config.products == 1
            theirs = errors(self.ordered(self.x @ self.w), reference, bound)
            ours |= {f"{name} ratio": ours[name] / theirs[name] for name in ("frobenius", "componentwise")}
            ours["bias of torch"] = theirs["bias"]
        self.out.fill_(float("nan"))
        self.run(gemm)()
        full = (reference + self.bias.double()) * 2
        full = torch.where(full > 0, full, full * 0.1)
        ours["epilogue"] = errors(self.out, full, bound)["frobenius"]
        again = self.out.clone()
        self.run(gemm)()
        ours["repeats"] = torch.equal(again, self.out)
        return ours

    def ordered(self, product: torch.Tensor) -> torch.Tensor:
        return product.T if self.config.registers else product

    def run(self, gemm: Gemm) -> Callable[[], None]:
        return gemm.prepare(self.a, self.b, self.out, self.bias, 2.0, 0.1, self.exponents, self.k)

    def baseline(self) -> Callable[[], Any]:
        torch.backends.cuda.matmul.allow_tf32 = self.config.products == 1
        out = torch.empty(self.out.shape, dtype=self.x.dtype, device="cuda")
        a, b = (self.w.T, self.x.T) if self.config.registers else (self.x, self.w)
        return lambda: torch.mm(a, b, out=out)


def perform(experiment: Experiment) -> Iterator[dict[str, Any]]:
    config = experiment.config
    gemm = Gemm(config, compile_source(config.source()))
    tolerance = 5e-3 if config.out != "float" else 1e-3 if config.products == 1 else 3e-6
    for shape in experiment.shapes:
        for kind in experiment.inputs:
            bench = Bench(config, shape, kind)
            found = bench.check(gemm)
            ok = found["frobenius"] < tolerance and found["epilogue"] < tolerance and found["repeats"]
            yield {"name": experiment.name, "shape": shape, "inputs": kind, "ok": bool(ok), **found}
    if experiment.timed:
        bench = Bench(config, experiment.shapes[0], "normal")
        runs: dict[str, Callable[[], Any]] = {"ours": bench.run(gemm), "torch": bench.baseline()}
        if config.scaled:
            runs["split of b"] = bench.split_run
        ms = interleaved(runs)
        flops = 2 * bench.m * bench.n * bench.k * config.products
        yield {
            "name": experiment.name,
            "shape": experiment.shapes[0],
            "ms": ms,
            "speedup": ms["torch"] / ms["ours"],
            "tflops": flops / ms["ours"] * 1e-9,
        }


# ---- Workers --------------------------------------------------------------------------------------------------------


def work(todo: list[Experiment], pipe: Any) -> None:
    for experiment in todo:
        pipe.send(("start", experiment.name))
        try:
            for row in perform(experiment):
                pipe.send(("row", row))
        except Exception as error:
            pipe.send(
                ("row", {"name": experiment.name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]})
            )
            if "CUDA" in str(error):
                return  # the context is lost
    pipe.send(("end", ""))


def supervise(todo: list[Experiment], output: Path, patience: float) -> None:
    context = multiprocessing.get_context("fork")
    with output.open("w") as file:
        while todo:
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(todo, sender))
            worker.start()
            sender.close()
            current = 0
            try:
                while receiver.poll(patience):
                    kind, value = receiver.recv()
                    if kind == "end":
                        current = len(todo)
                        break
                    if kind == "start":
                        current = next(i for i, e in enumerate(todo) if e.name == value)
                        continue
                    file.write(json.dumps(value) + "\n")
                    file.flush()
                    report(value)
                else:
                    print(f"HUNG: {todo[current].name}", flush=True)
                    current += 1
            except EOFError:
                print(f"worker died after {todo[current].name}", flush=True)
                current += 1
            worker.kill()
            worker.join()
            todo = todo[current:]


def report(row: dict[str, Any]) -> None:
    def short(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    ms = " ".join(f"{name} {value:.4f}" for name, value in row.get("ms", {}).items())
    fields = [f"{key} {short(v)}" for key, v in row.items() if key not in ("name", "ms", "repeats")]
    print(f"{row['name']:26}", ms, ", ".join(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("compile", "run"))
    parser.add_argument("output", type=Path, nargs="?", default=Path("lab.jsonl"))
    parser.add_argument("--only", default="")
    parser.add_argument("--patience", type=float, default=25)
    arguments = parser.parse_args()
    todo = [e for e in experiments() if arguments.only in e.name]
    if arguments.action == "compile":
        for source in dict.fromkeys([SPLIT.format(planes=p) for p in (1, 2)] + [e.config.source() for e in todo]):
            compile_source(source)
        return
    start = time.time()
    supervise(todo, arguments.output, arguments.patience)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
