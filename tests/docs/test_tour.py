"""docs/tour.md, followed word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import DOCS, Runner, blocks


def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    runner = Runner(tmp_path, monkeypatch, capfd)
    for block in blocks(DOCS / "tour.md"):
        runner.run(block)
    assert {"model_new.py", "verify.json", "report.html"} <= {p.name for p in tmp_path.iterdir()}
