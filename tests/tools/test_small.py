"""Large constants made small, so that a CPU can check the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusewright.capture import model_file
from fusewright.errors import EagerFailure
from fusewright.tools import small as tool
from fusewright.tools.small import Small, run_eagerly, small
from model_files import model

BODY = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(wide, {})

    def forward(self, x):
        return torch.relu(self.gemm(x)){}
"""


def reduced(text: str, folder: Path) -> Small:
    path = folder / "model.py"
    path.write_text(text)
    return small(model_file.load(path), {}, None)


def test_large_constants_become_ragged(tmp_path: Path) -> None:
    text = "rows = 4096\nwide = 8192\nsame = 8192\nfew = 3\n" + model(
        BODY.format("same", ""), inputs="torch.rand(rows, wide)"
    )
    found = reduced(text, tmp_path)
    assert found.sizes == "rows = 136, wide = 200, same = 200"
    assert found.inputs[0].shape == (136, 200) and found.parameters == 200 * 200 + 200


def test_sizes_that_depend_on_each_other(tmp_path: Path) -> None:
    """Where ragged sizes do not run, powers of two are tried."""
    text = "rows = 512\nwide = 1024\n" + model(BODY.format("wide", ".view(-1, 4096)"), inputs="torch.rand(rows, wide)")
    assert reduced(text, tmp_path).sizes == "rows = 256, wide = 256"


def test_only_the_batch_is_cut_where_constants_cannot(tmp_path: Path) -> None:
    text = "wide = 300\n" + model(BODY.format(16, ""), inputs="torch.rand(512, 300), ").replace(
        "forward(self, x)", "forward(self, x, y=None)"
    )
    found = reduced(text, tmp_path)
    assert found.sizes == "batch 37" and found.inputs[0].shape == (37, 300)


def test_small_files_stay(tmp_path: Path) -> None:
    found = reduced("wide = 20\n" + model(BODY.format(16, "")), tmp_path)
    assert found.inputs[0].shape[1] == 20 and found.sizes


@pytest.mark.parametrize("quick", [True, False])
def test_eager_is_run_at_sizes_that_are_quick(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the file's own otherwise only where the model does not run at small ones."""
    monkeypatch.setattr(tool, "_QUICK", 1e12 if quick else 0.0)

    def sizes(more: str = "", inputs: str = "torch.rand(rows, wide)") -> set[str]:
        body = BODY.replace("return", f"y = self.gemm(x); print(len(y)){more}\n        return").format(16, "")
        path = tmp_path / "model.py"
        path.write_text("rows = 512\nwide = 300\n" + model(body, inputs=inputs))
        run_eagerly(model_file.load(path), {}, None)
        return set(capsys.readouterr().out.split())

    assert sizes() == {"512" if quick else "200"}
    assert "512" in sizes("; assert len(x) == 512")
    with pytest.raises(EagerFailure, match="must have the same dtype"):
        sizes(inputs="torch.rand(rows, wide).double()")


def test_an_empty_batch_is_checked_with_rows(tmp_path: Path) -> None:
    found = reduced(model(BODY.format(16, "").replace("wide", "20"), inputs="torch.rand(0, 20)"), tmp_path)
    assert found.inputs[0].shape[0] > 0 and found.inputs[0].norm() > 0 and "empty" in found.sizes


def test_an_empty_batch_that_has_to_be(tmp_path: Path) -> None:
    text = model(BODY.format(16, "[:, :0] + x.view(0, 20)[:, :0]").replace("wide", "20"), inputs="torch.rand(0, 20)")
    assert reduced(text, tmp_path).inputs[0].shape == (0, 20)
