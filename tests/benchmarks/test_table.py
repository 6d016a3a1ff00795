"""The generated tables: written from results, noticed when stale, and the only place of figures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = _program("table")

ENVIRONMENT = {
    "device": "A GPU",
    "python": "3.12.3",
    "when": "2026-01-02T03:04:05+00:00",
    "card": {"driver_version": "580.1", "clocks.max.sm": "1980 MHz"},
    "versions": {"torch": "2.11.0"},
}


def _timing(ms: float) -> dict[str, float]:
    return {"ms": ms, "low": ms, "high": ms, "trials": 50}


def compared() -> dict[str, Any]:
    """Results of the programs that compare many models."""
    case = {
        "speedup": 2.0,
        "error_over_inductor": 0.5,
        "timings": {"fusewright alone": _timing(1.0), "inductor": _timing(2.0)},
        "program": {"family": "gemm_sm90", "tile": "128×256×64"},
    }
    failed = {"m": 600, "n": 700, "k": 512, "steps": [], "results": {"float32": {"failed": "why"}}}
    summary = {"cases": 1, "failed": 1, "geometric_mean": 2.0, "target": 3.5, "least": 2.0, "most": 2.0}
    mode = {"best": "inductor", "speedup": 3.0, "timings": {"inductor max-autotune": _timing(3.0)}}
    launches = {n: {"forward": count, "forward+backward": 3 * count} for n, count in (("eager", 5), ("fusewright", 3))}
    curve = [1.0, 0.5, 0.25]
    return {
        "sweep": {
            "environment": ENVIRONMENT,
            "seed": 1234,
            "trials": 10,
            "cases": [
                {"m": 1000, "n": 2048, "k": 512, "steps": ["bias", "GELU"], "results": {"float32": case}},
                failed,
            ],
            "summary": {"float32": summary | {"device": 2.5, "floor": 4.0, "error_over_inductor": 0.5}},
        },
        "epilogues": {
            "environment": ENVIRONMENT,
            "size": 4096,
            "dtype": "bfloat16",
            "timings": {n: _timing(0.2) for n in ("nothing", "bias", "cuBLAS")},
            "summary": {"bare_ms": 0.2, "limit": 0.03, "costs": {"bias": 0.0125}, "worst": 0.0125},
        },
        "zoo": {
            "environment": ENVIRONMENT,
            "models": {"gated_mlp": {"float32": {"modes": {"forward": mode}, "kernels": launches}}},
            "summary": {
                "float32": {
                    "geometric_mean": 3.0,
                    "target": 3.0,
                    "worst": ["gated_mlp, forward", 3.0],
                    "device": {"geometric_mean": 3.5, "worst": ["gated_mlp, forward", 3.25]},
                    "least_allowed": 0.97,
                }
            },
        },
        "training": {
            "environment": ENVIRONMENT,
            "steps": 3,
            "batch": 8,
            "layers": [4, 2],
            "window": 25,
            "eager_runs": 2,
            "runs": {
                "float32, SGD": {
                    "eager": [curve, curve],
                    "fusewright": curve,
                    "distance": 1e-4,
                    "spread": 2e-4,
                    "passed": True,
                    "last_loss": 0.25,
                },
                "bfloat16, SGD": {"failed": "why"},
            },
        },
        "precision": {
            "environment": ENVIRONMENT,
            "flags": {
                "highest": {
                    "errors": {"fusewright": {"over_eager": 0.25}},
                    "modes": {
                        "forward": {
                            "timings": {
                                "eager": _timing(2.0),
                                "fusewright": _timing(0.5),
                                "inductor": {"failed": "why"},
                            },
                            "times_faster": {"fusewright": 4.0},
                        }
                    },
                }
            },
        },
        "parity": {
            "environment": ENVIRONMENT,
            "host": {"libc": "glibc 2.39", "compiler": "g++"},
            "operands": 1048576,
            "exact": {"float32": {"add": {"same": 1.0}, "fmod": {"same": 0.5}}, "float64": {"add": {"same": 1.0}}},
            "functions": {
                "float32": {"exp": {"ulps": 2}, "tan": {"ulps": 1}, "log": {"ulps": 1}},
                "float64": {"exp": {"ulps": 1}, "tan": {"ulps": 0}, "log": {"ulps": 1}},
            },
            "hopper": {"sums": "", "stores": "3 of 4 differ"},
        },
        "tower": {
            "environment": ENVIRONMENT,
            "batch": 16,
            "target": 0.8,
            "geometric_mean": 0.75,
            "towers": {
                "float32, 1024 wide": {
                    "timings": {"eager": _timing(0.1), "fusewright, CUDA graphs": {"failed": "why"}},
                    "over_reduce_overhead": 0.75,
                }
            },
        },
    }


def _results() -> dict[str, Any]:
    errors = {"output": {"median": 0.9, "bias": 1.1}, "gradient of x": {"median": 0.7}}
    timings = {"eager": _timing(2.0), "fusewright": _timing(1.5), "fusewright alone": {"failed": "why"}}
    timings |= {"inductor reduce-overhead": _timing(1.75), "fusewright, CUDA graphs": _timing(1.25)}
    faster = {"fusewright": 2 / 1.5, "fusewright, CUDA graphs": 1.4}
    mode = {"timings": timings, "floor_ms": 0.75, "over_eager": 0.75, "over_best": 0.75, "times_faster": faster}
    kernels = {"forward": ["a"], "backward": ["b", "c", "d"]}
    dtype = {
        "modes": {"forward": mode},
        "errors": {"fusewright": errors, "fusewright alone": {"failed": "why"}},
        "kernels": {"eager": {"forward": ["a"] * 3, "backward": ["b"] * 5}, "fusewright alone": kernels},
    }
    product = {
        "layout": "x·Wᵀ",
        "size": [1, 2, 3],
        "chosen": "tile",
        "timings": {"cublas": _timing(1.0), "tile": _timing(1.25)},
        "share_of_cublas": {"tile": 0.8},
        "error_over_cublas": {"tile": {"median": 0.5, "maximum": 0.625}},
    }
    state = {"fusewright_s": 3.0, "inductor_s": 6.0, "own_s": 0.5, "ratio": 0.5}
    error = {"frobenius": 0.25, "componentwise": 0.5}
    accuracy = {k: {"float32": error, "tf32": error} for k in ("1000", "31")}
    return {
        "headline": {
            "environment": ENVIRONMENT,
            "rates": {"fp16_flop_per_s": 7.7e14, "copy_bytes_per_s": 4.2e12},
            "dtypes": {"float32": dtype},
            "overheads": {"launch": {"us": 3.21}},
        },
        "gemm_simt": {"environment": ENVIRONMENT, "products": [product]},
        "first_call": {"environment": ENVIRONMENT, "summary": {"cold": state, "warm": state}},
        "accuracy": {"environment": ENVIRONMENT, "size": [8, 16], "seeds": 5, "products": {"normal": accuracy}},
        **compared(),
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, result in _results().items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


def _document(folder: Path, *names: str) -> Path:
    path = folder / "README.md"
    path.write_text("# Title\n" + "".join(f"<!-- {n}:begin -->\nold\n<!-- {n}:end -->\nbetween\n" for n in names))
    return path


def _run(document: Path, results: Path, *more: str) -> int:
    return int(table.main([str(document), "--results", str(results), *more]))


def test_writes_every_table_from_the_results(tmp_path: Path, results: Path) -> None:
    document = _document(tmp_path, *table.TABLES)
    assert _run(document, results) == 0
    text = document.read_text()
    assert "| float32, forward | 2.000 | – | – | 1.500 | – | 0.75× | 0.75× | – | 50% |" in text
    assert "| float32, forward | 2.000 | – | 1.750 | 1.250 | 1.40× |" in text
    assert "| float32 | 1.10× | 0.70× | – | – | 3 → 1 | 5 → 3 |" in text
    assert "| launch | 3.2 |" in text
    assert "| x·Wᵀ, x 1×3, W 2×3 | 1.000 | 1.250 | tile | 80% | 0.62× |" in text
    assert "| cold cache | 6.00 | 3.00 | 0.50× | 0.50 |" in text
    assert "| over cuBLAS SGEMM | K = 31 | K = 1000 |" in text and "| normal | 0.25, 0.5 | 0.25, 0.5 |" in text
    assert "| float32 | 1 (1 failed) | 2.00× | 2.50× | 3.50× | 2.00× | 2.00× | 4.00× | 0.50× |" in text
    assert "| float32 | 1000×2048×512 | bias, GELU | 2.00× | 1.000 | 2.000 | gemm_sm90 128×256×64 | 0.48 |" in text
    assert "drawn from seed 1234" in text and "![Speedups of the sweep by size and precision](images/sweep.svg)" in text
    assert "| bare product | 0.2000 | – |\n| bias | 0.2000 | +1.2% |" in text
    assert "| `gated_mlp` | 5 → 3 | 15 → 9 | 3.00× · – | – · – | torch.compile |" in text
    assert "Device alone: 3.50×, worst 3.25× (gated_mlp, forward)." in text
    assert (
        "worst 3.00× (gated_mlp, forward; none may be below 0.97×)" in text and "took part in: float32 1 of 1" in text
    )
    assert "Kernels as launched in float32" in text
    assert "| float32, SGD | 0.0001 | 0.0002 | 0.25 | yes |\n| bfloat16, SGD | – | – | – | failed |" in text
    assert "| float32, 1024 wide | 0.100 | – | – | – | – | 0.75× |" in text
    assert "| nothing | – | `tan` |\n| 1 ulp | `log`, `tan` | `exp`, `log` |\n| 2 ulps | `exp` | – |" in text
    assert "over 1,048,576 operands" in text and "1 of 2 in float32, not `fmod`; 1 of 1 in float64." in text
    assert "Of 2 cases all but `stores` gave the simulator's bits.\nNot compared with a GPU yet: `sums_of_" in text
    assert text.count("\nbetween\n") == len(table.TABLES) and "\nold\n" not in text
    assert _run(document, results) == 0
    assert document.read_text() == text


def test_check_fails_when_results_have_changed_and_writes_nothing(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _document(tmp_path, *table.TABLES)
    _run(document, results)
    assert _run(document, results, "--check") == 0
    changed = _results()["first_call"]
    changed["summary"]["cold"]["own_s"] = 0.75
    (results / "first_call.json").write_text(json.dumps(changed))
    before = document.read_text()
    assert _run(document, results, "--check") == 1
    assert document.read_text() == before
    assert "stale" in capsys.readouterr().err


def test_names_the_marker_that_is_missing(tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(_document(tmp_path, "headline", "gemm_simt"), results) == 1
    assert "<!-- first_call:begin -->" in capsys.readouterr().err


def test_names_the_table_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _document(tmp_path, "headline")
    before = document.read_text()
    assert _run(document, tmp_path / "nowhere") == 1
    assert "'headline'" in capsys.readouterr().err
    assert document.read_text() == before


def test_leaves_what_others_generate(tmp_path: Path, results: Path) -> None:
    document = _document(tmp_path, *table.TABLES, "unheard-of")
    assert _run(document, results) == 0
    text = document.read_text()
    assert text.count("\nold\n") == 1 and "<!-- unheard-of:begin -->\nold\n" in text


def test_a_table_may_wait_for_its_results_where_the_document_says_so(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _document(tmp_path, *table.TABLES)
    _run(document, results)
    whole = (results / "sweep.json").rename(tmp_path / "sweep.json")
    before = document.read_text()
    assert _run(document, results, "--check") == 1, "a table without its results"
    assert "'Not measured yet'" in capsys.readouterr().err
    assert _run(document, results) == 1 and document.read_text() == before
    document.write_text(before.replace("<!-- sweep:begin -->\n", "<!-- sweep:begin -->\nNot measured yet\n"))
    assert _run(document, results) == 0 and "benchmarks/sweep.py` does it" in document.read_text()
    assert _run(document, results, "--check") == 0
    whole.rename(results / "sweep.json")
    assert _run(document, results, "--check") == 1, "the results are there"
    assert _run(document, results) == 0 and document.read_text() == before


def test_committed_tables_are_current() -> None:
    assert table.main(["--check"]) == 0


# A measured figure: a time, a rate or a ratio. Sizes, versions and targets ("at most …") are none.
FIGURE = re.compile(r"\b\d+(?:\.\d+)?\s?(?:ms|µs|us|TFLOP/s|GFLOP/s|TB/s|GB/s)\b|\b\d+\.\d+\s?(?:×|x)(?=\W|$)")


def test_figures_stand_in_generated_tables_only() -> None:
    assert FIGURE.search("takes 1.5 ms") and FIGURE.search("is 2.3× faster") and not FIGURE.search("a 128×64 tile")
    for path in table.documents():
        # What a command prints is held to it by the tests of the documents.
        text = re.sub(r"^```text\n.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        found = FIGURE.findall(table.without_tables(text))
        assert not found, f"{path} has figures outside its generated tables: {found}"
