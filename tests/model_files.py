"""Model files of many shapes, and the files that are written for them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fusewright.capture.model import CapturedModel
from fusewright.capture.model_file import ModelFile
from fusewright.capture.without_gpu import without_gpu
from fusewright.chip import chip_for
from fusewright.tools.emit import Emitted, emit
from fusewright.tools.optimize import load_and_capture

_HEAD = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n\n"
_TAIL = """

def get_inputs():
    return [torch.rand(24, 20)]


def get_init_inputs():
    return []
"""


def model(body: str, *, before: str = "", inputs: str = "torch.rand(24, 20)", after: str = "") -> str:
    """A model file with class Model of this body (indented by four) and these inputs."""
    tail = _TAIL.replace("torch.rand(24, 20)", inputs)
    return f"{_HEAD}{before}class Model(nn.Module):\n{body.strip(chr(10))}\n{after}{tail}"


_LINEAR = """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)
"""

MODELS = {
    "several inputs": model(
        _LINEAR
        + """
    def forward(self, x, scale, *, residual=None):
        return torch.relu(self.gemm(x) * scale) + scale.sigmoid()
""",
        inputs="torch.rand(24, 20), torch.rand(24, 16)",
    ),
    "three dimensions": model(
        _LINEAR
        + """
    def forward(self, x):
        return F.silu(self.gemm(x))
""",
        inputs="torch.rand(6, 4, 20)",
    ),
    "sequential": model("""
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(20, 16), nn.LeakyReLU(0.2))
        self.rest = nn.ModuleList([nn.Linear(16, 12), nn.Linear(12, 8, bias=False)])

    def forward(self, x):
        x = self.seq(x)
        for layer in self.rest:
            x = torch.tanh(layer(x))
        return x
"""),
    "module dict": model("""
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(20, 16), "act": nn.Hardtanh(-0.5, 0.5)})

    def forward(self, x):
        return self.parts["act"](self.parts["first"](x))
"""),
    "buffers": model("""
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16)
        self.register_buffer("shift", torch.arange(16.0))
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return (self.gemm(x) + self.shift) * self.scale
"""),
    "tuple": model(
        _LINEAR
        + """
    def forward(self, x):
        y = self.gemm(x)
        return torch.relu(y), (torch.sigmoid(y), [x + 1.0])
"""
    ),
    "dict": model(
        _LINEAR
        + """
    def forward(self, x):
        y = self.gemm(x)
        return {"y": torch.exp(-y.abs()), "positive": y > 0, "none": None}
"""
    ),
    "indices first": model(
        _LINEAR
        + """
    def forward(self, x):
        y = self.gemm(x)
        return y > 0, torch.tanh(y)
"""
    ),
    "one in a list": model(
        _LINEAR
        + """
    def forward(self, x):
        return [torch.relu(self.gemm(x))]
"""
    ),
    "shared linear": model("""
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 20)
        self.again = self.gemm

    def forward(self, x):
        return self.again(torch.relu(self.gemm(x)))
"""),
    "two linears": model("""
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(20, 48)
        self.down = nn.Linear(48, 20, bias=False)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.down(self.gelu(self.up(x))) + x
"""),
    "no parameters": model("""
    def forward(self, x):
        return F.gelu(x) * 3.0
"""),
    "integers": model(
        """
    def forward(self, x):
        return (x + 3) * 2
""",
        inputs="torch.arange(24 * 20).reshape(24, 20)",
    ),
    "float16": model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16).half()

    def forward(self, x):
        return torch.relu(self.gemm(x))
""",
        inputs="torch.rand(24, 20).half()",
    ),
    "bfloat16": model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(20, 16, dtype=torch.bfloat16)

    def forward(self, x):
        return torch.relu(self.gemm(x)) * 0.5
""",
        inputs="torch.rand(24, 20, dtype=torch.bfloat16)",
    ),
    "tensor cores": model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(320, 192, dtype=torch.bfloat16)

    def forward(self, x):
        return F.leaky_relu(self.gemm(x) * 2.0, 0.1)
""",
        inputs="torch.rand(200, 320, dtype=torch.bfloat16)",
    ),
    "float32 halves": model(
        """
    def __init__(self):
        super().__init__()
        self.gemm = nn.Linear(2048, 1024)

    def forward(self, x):
        return F.leaky_relu(self.gemm(x) * 2.0, 0.1)
""",
        inputs="torch.rand(1024, 2048)",
    ),
    "surroundings": model(
        '''
    """A model: with decorators, class attributes, other methods."""

    slope = 0.25  # of the class
    kind: str = "leaky"

    def __init__(self):
        super(Model, self).__init__()
        Model.made += 1
        # the only parameter
        self.gemm = nn.Linear(20, 16)
        self.name = 'a "quoted" {name}'

    made = 0

    @property
    def half(self):
        return self.slope / 2

    @decorated
    def helper(self, y):
        # of forward
        return F.leaky_relu(y, self.slope)

    # what it computes
    @decorated
    def forward(
        self,
        x: torch.Tensor,  # an input
    ) -> torch.Tensor:
        """Says what it does.

        In two paragraphs.
        """
        y = self.gemm(x)
        return self.helper(y) * self.half

    def after(self):
        return "kept"
''',
        before=(
            '"""Not the module docstring."""\nLIMIT = 3  # a constant\n\n\ndef decorated(function):\n'
            "    return function\n\n\n@torch.no_grad\ndef nothing():\n    return Model\n\n\n"
        ),
        after="\n\ndef build():\n    return Model()  # Model of this file\n\n\nDEFAULT: type = Model\n",
    ),
    "one line": model(
        _LINEAR
        + """
    def forward(self, x): return torch.relu(self.gemm(x))

    def after(self): return 1
"""
    ),
    "one line after a docstring": model(
        _LINEAR
        + """
    def forward(self, x):
        "One line."; return torch.relu(self.gemm(x))
"""
    ),
    "named this": model("""
    def __init__(this):
        super().__init__()
        this.gemm, this.factor = nn.Linear(20, 16), 1.5

    def forward(this, x):
        return torch.relu(this.gemm(x)) * this.factor
"""),
    "tabs": model(
        """
	def __init__(self):
		super().__init__()
		self.gemm = nn.Linear(20, 16)

	def forward(self, x):
		'''Indented by tabs.'''
		return torch.relu(self.gemm(x))
"""
    ),
    "two spaces": model(
        """
  def __init__(self):
    super().__init__()
    self.gemm = nn.Linear(20, 16)

  def forward(self, x):
    '''Indented by two.'''
    @kept
    def last(y):
      return y * 2
    return last(torch.relu(self.gemm(x)))

  def after(self):
    return 1
""",
        before="def kept(function):\n    return function\n\n\n",
    ),
    "variadic": model(
        """
    def forward(self, *tensors):
        first, second = tensors
        return torch.maximum(first, second)
""",
        inputs="torch.rand(24, 20), torch.rand(24, 20)",
    ),
    "flattened": model("""
    def forward(self, x):
        return torch.relu(x).reshape(-1)
"""),
    "residual": model(
        """
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(20))

    def forward(self, x, y):
        return x + y + self.shift
""",
        inputs="torch.rand(24, 20), torch.rand(24, 20)",
    ),
    "twice": model("""
    def forward(self, x):
        y = torch.relu(x)
        return y, y
"""),
    "global": model(
        """
    def forward(self, x):
        return torch.relu(x) * weights
""",
        before="weights = torch.arange(20.0)\n\n\n",
    ),
    "windows": model(
        _LINEAR
        + """
    def forward(self, x):
        return torch.relu(self.gemm(x))
"""
    ).replace("\n", "\r\n"),
}


# What no file can be written for, and what the message says.
REFUSED = {
    "a view of another result": model("""
    def forward(self, x):
        y = torch.relu(x)
        return y, y.t()
"""),
    "alias of input": model("""
    def forward(self, x):
        return torch.relu(x), x
"""),
    "inherited": _HEAD
    + """class Base(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class Model(Base):
    pass
"""
    + _TAIL,
}


@dataclass(frozen=True)
class Written:
    """A model file and what is written for it. original: its text with plain line ends."""

    original: str
    file: ModelFile
    captured: CapturedModel
    emitted: Emitted

    @property
    def text(self) -> str:
        return self.emitted.text


def written(
    text: str,
    *,
    dtype: torch.dtype | None = None,
    library: bool = False,
    name: str = "model",
    chip: str = "sm_90a",
) -> Written:
    """Traces the file and writes another for it; nothing is compiled."""
    with tempfile.TemporaryDirectory() as folder, without_gpu():
        path = Path(folder) / f"{name}.py"
        path.write_bytes(text.encode())
        file, instance, captured = load_and_capture(path, {}, dtype, chip_for(chip), library=library)
        emitted = emit(file, instance.model, captured, chip_for(chip), library=library, dtype=dtype)
    return Written(text.replace("\r\n", "\n"), file, captured, emitted)


@functools.cache
def varied(name: str) -> Written:
    return written(MODELS[name])
