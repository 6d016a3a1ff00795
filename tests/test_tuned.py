"""The text of the tuner's choices."""

from __future__ import annotations

import pytest

from fusewright.errors import InvalidSetting
from fusewright.settings import Settings
from fusewright.tuned import Choice, parse, text

FIRST = Choice("fused_addmm_gelu bfloat16 nt", (1024, 8192, 512), "gemm_sm90 128x256x64")
SECOND = Choice("fused_mm f16x3 tn", (3, 1024, 8, 0), "gemm_skinny 8x128 split")
THIRD = Choice("fused_mul", (7, 1), "library")
FOURTH = Choice("fused_mm bfloat16 nn", (64, 64, 64), "gemm_sm90 128x128x64 ping-pong")


def test_what_is_printed_is_read() -> None:
    choices = (FIRST, SECOND, THIRD, FOURTH)
    assert parse(text(choices)) == choices
    assert parse(text(choices).replace("\n", ";")) == choices
    assert parse(f"\n  # NVIDIA H200\n   {SECOND}  \n\n{THIRD}; ") == (SECOND, THIRD)
    assert parse(str(FIRST).replace("x256x", "×256×")) == (FIRST,)
    assert parse(f"{FIRST}\n{FIRST}") == (FIRST,) and parse("") == ()


@pytest.mark.parametrize("wrong", ["gemm_sm90", "fused_mm bfloat16 nt: library", "fused_mm nt 4x4x4 library", "a 4x4:"])
def test_what_is_no_choice_is_named(wrong: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"'{wrong}'.*a choice is such as"):
        Settings.of({"tuned": f"{FIRST}\n{wrong}"})


def test_two_programs_for_one_range_of_sizes() -> None:
    other = "fused_addmm_gelu bfloat16 nt 1500x8192x1000: library"
    with pytest.raises(InvalidSetting, match="two programs for sizes that share one"):
        parse(f"{FIRST}; {other}")
    assert len(parse(f"{FIRST}; {other.replace('1500', '2500')}")) == 2
