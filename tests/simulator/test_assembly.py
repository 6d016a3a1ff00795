"""Shared memory in the compiler's assembly: guards, the dynamic region, and what each kernel reaches."""

from __future__ import annotations

import pytest

from fusewright.simulator.assembly import GUARD_BYTES, lay_out, variable_name

TEXT = """\t.text
\t.type\tkernel, @function
kernel:
\tdata16 leaq\ttile@tlsgd(%rip), %rdi
\tcall\thelper
\t.size\tkernel, .-kernel
\t.type\thelper, @function
helper:
\tdata16 leaq\tdynamic@tlsgd(%rip), %rdi
\tcall\thelper
\t.size\thelper, .-helper
\t.type\tother, @function
other:
\tret
\t.size\tother, .-other
\t.section\t.tbss,"awT",@nobits
\t.align 4
\t.type\ttile, @object
\t.size\ttile, 128
tile:
\t.zero\t128
\t.align 4
\t.type\tlast, @object
\t.size\tlast, 4
last:
\t.zero\t4
\t.section\t.bss
table:
\t.zero\t64
"""


def test_layout() -> None:
    laid_out = lay_out(TEXT, ["kernel", "other"], 1000)
    assert laid_out.variables == {"tile": 128, "last": 4}
    assert laid_out.dynamic == ("dynamic",)
    assert f"tile:\n\t.zero\t{128 + GUARD_BYTES}\n" in laid_out.text
    assert f"last:\n\t.zero\t{4 + GUARD_BYTES}\n" in laid_out.text
    assert "table:\n\t.zero\t64\n" in laid_out.text
    assert f"\ndynamic:\n\t.zero\t{1000 + GUARD_BYTES}\n" in laid_out.text
    assert {"tile", "helper", "dynamic"} <= laid_out.uses["kernel"]
    assert not {"tile", "dynamic"} & laid_out.uses["other"]


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZZN2fw3runEvE4tile", "tile"),
        ("_ZZN2fw3runEvE4tile_0", "tile"),
        ("_ZN10fusewright14dynamic_sharedE", "dynamic_shared"),
        ("_ZZN1a8GemmSimtIffLi128EE3runEPKfE6shared", "shared"),
        ("_ZZN20fusewright_source_18spin_oneEPKfE1f", "f"),
        ("plain", "plain"),
    ],
)
def test_variable_names(symbol: str, name: str) -> None:
    assert variable_name(symbol) == name
