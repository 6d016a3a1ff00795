"""What `explain` counts: operators before, launches after, bytes, FLOP, and the floor."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fusewright.chip import Chip, chip_for
from fusewright.tools.explain import Explanation, explain, render
from model_files import MODELS, model, varied, written

CHIP = chip_for("sm_90a")


def explained(text: str, library: bool = False, chip: Chip = CHIP) -> list[Explanation]:
    planned = written(text, library=library, chip=chip.arch).emitted.planned
    return [explain(p, p.sizes, chip) for p in planned]


def shown(explanations: list[Explanation]) -> str:
    stream = io.StringIO()
    header = {"model": "model.py", "inputs": "float32 [24, 20]", "arch": "sm_90a"}
    Console(file=stream, width=200).print(render(explanations, header, CHIP))
    return stream.getvalue()


def test_counts_of_a_product_with_an_epilogue() -> None:
    """x [24, 20], weight [16, 20], bias [16]; the product's result and its ReLU are [24, 16], all float32."""
    first = next(explain(p, p.sizes, CHIP) for p in varied("one in a list").emitted.planned)
    operands, result = 24 * 20 + 16 * 20 + 16, 24 * 16
    (row,) = first.regions
    assert first.graph == "inference" and row.operators == ["addmm", "relu"]
    assert (first.launches_before, first.launches_after) == (2, 1)
    assert first.bytes_before == 4 * (operands + result + 2 * result)
    assert first.bytes_after == row.bytes == 4 * (operands + result)
    assert row.flop == 2 * 24 * 20 * 16
    assert row.floor_seconds == first.floor_seconds == max(row.bytes / CHIP.bandwidth, row.flop / CHIP.fp32)


def test_the_floor_of_few_rows_is_that_of_tensor_cores() -> None:
    """32 rows make the A100's CUDA cores slower than its memory; gemm_skinny does not use them."""
    chip = chip_for("sm_80")
    text = model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(4096, 4096)

    def forward(self, x):
        return self.gemm(x)
""",
        inputs="torch.rand(32, 4096)",
    )
    (row,) = explained(text, chip=chip)[0].regions
    assert row.family.startswith("gemm_skinny")
    assert row.floor_seconds == row.bytes / chip.bandwidth < row.flop / chip.fp32


def test_the_floor_is_that_of_the_dtype() -> None:
    wide = "torch.rand(512, 4096)"
    body = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(4096, 4096){}

    def forward(self, x):
        return self.gemm(x)
"""
    # float32 by halves: three products of fp16, after a step that splits the operands.
    rates = {"": CHIP.fp16 / 3, ".half()": CHIP.fp16, ".double()": CHIP.fp64}
    for cast, rate in rates.items():
        *splits, row = explained(model(body.format(cast), inputs=wide + cast))[0].regions
        assert [s.operators for s in splits] == ([] if cast else [["encode x", "encode weight"]])
        assert row.floor_seconds == pytest.approx(max(row.flop / rate, row.bytes / CHIP.bandwidth))
        said = "more, since tensor cores read float32 as halves" if not cast else "(0 B less)"
        assert said in shown(explained(model(body.format(cast), inputs=wide + cast))[:1])


def test_a_weight_that_is_rounded_in_registers_moves_once() -> None:
    """x, its halves and magnitudes; of the weight an exponent, and a sample that counts for nothing."""
    text = model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(8192, 8192)

    def forward(self, x):
        return self.gemm(x)
""",
        inputs="torch.rand(1024, 8192)",
    )
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        encode, row = explained(text)[0].regions
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert row.family == "gemm_sm90 256×128×64 in registers"
    assert encode.bytes == 4 * (1024 * 8192 + 1024 * 4096 + 1024) + 4


def test_training_saves_a_bit_an_element() -> None:
    _, forward, _ = [explain(p, p.sizes, CHIP) for p in varied("one in a list").emitted.planned]
    inference = explain(
        varied("one in a list").emitted.planned[0], varied("one in a list").emitted.planned[0].sizes, CHIP
    )
    assert 0 < forward.bytes_after - inference.bytes_after <= 24 * 16 / 8


def test_what_is_apart_says_why() -> None:
    _, _, backward = [explain(p, p.sizes, CHIP) for p in varied("two linears").emitted.planned]
    (refusal,) = backward.refusals
    assert list(refusal["operators"]) == ["sum"] and "reads the product from memory" in refusal["reason"]


def test_what_several_layers_have_in_common_is_said_once() -> None:
    """By the names of the model's operators: GELU begins with a primitive that no one has written."""
    text = model("""
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(20, 40) for _ in range(2))

    def forward(self, x):
        for linear in self.linears:
            a, b = linear(x).chunk(2, -1)
            x = F.gelu(a) * b
        return torch.sort(torch.sort(x)[0])[0]
""")
    found = shown(explained(text, library=True))
    assert found.count("gelu (2 times) apart: the slice of a matrix product") == found.count(" apart:") > 0
    assert "sort (2 times) runs as ATen" in found and "sort runs" not in found


def test_a_graph_of_aten_alone_has_no_floor() -> None:
    text = model("""
    def forward(self, x):
        return torch.sort(x)[1]
""")
    found = shown(explained(text, library=True))
    assert "moves" in found and "datasheet" not in found


def test_what_is_shown() -> None:
    text = model("""
    def forward(self, x):
        return torch.sort(torch.relu(x))[0]
""")
    found = "".join(
        shown(explained(source, library)) for library, source in ((True, text), (False, MODELS["two linears"]))
    )
    for words in (
        "model.py: float32 [24, 20], for sm_90a (H200)",
        "sort runs as ATen",
        "addmm, gelu",
        "datasheet rates",
    ):
        assert words in found
