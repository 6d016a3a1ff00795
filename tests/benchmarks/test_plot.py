"""Plots: drawn from results, the same each time, noticed when stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_table import compared

import plot


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in plot.PLOTS:
        (folder / f"{name}.json").write_text(json.dumps(compared()[name]))
    return folder


def _run(results: Path, *more: str) -> int:
    return plot.main(["--results", str(results), "--images", str(results.parent / "images"), *more])


def _images(results: Path) -> dict[str, str]:
    return {p.stem: p.read_text() for p in (results.parent / "images").glob("*.svg")}


def test_draws_and_checks(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(results, "--check") == 1 and not _images(results)
    assert _run(results) == 0
    first = _images(results)
    assert first.keys() == plot.PLOTS.keys()
    for name, text in first.items():
        assert plot.stamp(results / f"{name}.json") in text
    for word, name in (("geometric mean 2.00×", "sweep"), ("gated_mlp", "zoo"), ("float32, SGD", "training")):
        assert word in first[name]
    assert _run(results, "--check") == 0
    changed: dict[str, Any] = compared()["zoo"]
    changed["models"]["gated_mlp"]["float32"]["modes"]["forward"]["speedup"] = 5.0
    (results / "zoo.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert _run(results, "--check") == 1 and "the plot zoo is stale" in capsys.readouterr().err
    assert _run(results) == 0
    second = _images(results)
    assert second["zoo"] != first["zoo"] and second["sweep"] == first["sweep"]


def test_drawing_twice_gives_the_same_file(results: Path) -> None:
    texts = []
    for _ in range(2):
        plot.draw("sweep", results, results.parent / "images")
        texts.append(_images(results)["sweep"])
    assert texts[0] == texts[1]


def test_committed_plots_are_current() -> None:
    assert plot.main(["--check"]) == 0
