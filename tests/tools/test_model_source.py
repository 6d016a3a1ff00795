"""Cutting a model file at its class and at the body of `forward`."""

from __future__ import annotations

import ast

import pytest

from fusewright.errors import CannotCapture
from fusewright.tools.model_source import ModelSource, rename, split


def cut(text: str) -> ModelSource:
    return split(text, ast.parse(text))


def whole(source: ModelSource) -> str:
    return source.before + source.head + f"{source.indent}BODY\n" + source.tail + source.after


@pytest.mark.parametrize(
    "forward, expected",
    [
        ("    def forward(self, x):\n        return x\n", "    def forward(self, x):\n        BODY\n"),
        ("    def forward(self, x): return x\n", "    def forward(self, x):\n        BODY\n"),
        ("\tdef forward(self, x): return x\n", "\tdef forward(self, x):\n\t\tBODY\n"),
        ("\tdef forward(self, x):\n\t\t'''d'''\n\t\treturn x\n", "\tdef forward(self, x):\n\t\t'''d'''\n\t\tBODY\n"),
        ("  def forward(self, x):\n   y = x\n   return y\n", "  def forward(self, x):\n   BODY\n"),
        ("    def forward(self, x): 'é'; return x\n", "    def forward(self, x):\n        'é'\n        BODY\n"),
        (
            "    def forward(self, x: 'é',\n        y=(1, 2)):  # z\n        '''a\n        b'''; return x\n",
            "    def forward(self, x: 'é',\n        y=(1, 2)):  # z\n        '''a\n        b'''\n        BODY\n",
        ),
        (
            "    def forward(self, x):\n        # why\n        @g\n        def f(y): return y\n        return f(x)\n",
            "    def forward(self, x):\n        # why\n        BODY\n",
        ),
    ],
)
def test_body_is_cut_out(forward: str, expected: str) -> None:
    around = "import a\n\n@b\nclass Model(C):\n{}\n    # end\n    d = 1\n\nModel.e = 2\n"
    if "\t" in forward or "  def" in forward[:5]:
        around = around.replace("    # end\n    d = 1\n", "")
    source = cut(around.format(forward))
    assert whole(source) == around.replace("Model", "ModelNew").format(expected)
    ast.parse(whole(source))


def test_lines_are_those_of_python() -> None:
    """A form feed, U+2028 and others end no line, though `str.splitlines` takes them to."""
    text = "a = 'x\u2028\x85y'\n\x0cclass Model(C):\n    def forward(self, x):\n        {}\n\x0c\nModel.d = 2\n"
    assert whole(cut(text.format("return x"))) == text.replace("Model", "ModelNew").format("BODY")


def test_arguments_of_every_kind() -> None:
    source = cut("class Model:\n    def forward(this, a, /, b, *c, d, **e): return a\n")
    assert source.arguments == ("this", "a", "b", "c", "d", "e")


def test_the_last_definition_counts() -> None:
    text = "class Model:\n    def forward(self): return 1\n\n\n" * 2
    source = cut(text)
    assert source.before.strip() and not source.after.strip()
    assert "return 1" in source.before and "return 1" not in source.head + source.tail


@pytest.mark.parametrize(
    "text, says",
    [
        ("class A:\n    pass\n\n\nModel = A\n", "top level"),
        ("if True:\n    class Model:\n        def forward(self): return 1\n", "top level"),
        ("class Model(A):\n    pass\n", "no forward of its own"),
        ("class Model(A):\n    forward = f\n", "no forward of its own"),
    ],
)
def test_nothing_to_cut(text: str, says: str) -> None:
    with pytest.raises(CannotCapture, match=says):
        cut(text)


def test_rename_touches_code_alone() -> None:
    text = "# Model\nx = Model('Model', a.Model)\nclass Model(Modeled): 'Model'\nsuper(Model, self), Model\n"
    expected = (
        "# Model\nx = ModelNew('Model', a.Model)\nclass ModelNew(Modeled): 'Model'\nsuper(ModelNew, self), ModelNew\n"
    )
    assert rename(text) == expected
