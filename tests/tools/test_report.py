"""The page: well-formed, complete, escaped, from no network; and how a real browser shows it."""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import PROGRAM, Browser, chromium
from rich.console import Console

from fusewright.capture.model import CapturedModel
from fusewright.capture.without_gpu import without_gpu
from fusewright.chip import chip_for
from fusewright.errors import BadMeasurement, OutputNotWritable
from fusewright.tools.layered import layered
from fusewright.tools.optimize import header, load_and_capture
from fusewright.tools.planned import Planned, plan_model
from fusewright.tools.report import Page, Request, _graph, build, render, report
from fusewright.tools.report_graphs import operators
from fusewright.tools.report_measured import read_measured
from fusewright.tools.report_roofline import Point, roofline
from model_files import MODELS, model

CHIP = chip_for("sm_90a")
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}

# Two products, a refusal, an operator without a kernel, several results.
MIXED = model("""
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(20, 48)
        self.down = nn.Linear(48, 20, bias=False)

    def forward(self, x):
        y = self.down(F.gelu(self.up(x), approximate="tanh")) + x
        return torch.sort(y)[0], y
""")
HOSTILE = '<script>alert("1")</script>&amp;\'</title>.py'


class Tree(HTMLParser):
    """Every element with its attributes and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> in {self.stack}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and data.strip():
            self.text.setdefault(self.stack[-1], []).append(data.strip())

    def with_attribute(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.elements for key, value in attributes.items() if key == name]


def planned_of(text: str, name: str) -> tuple[dict[str, Any], CapturedModel, tuple[Planned, ...]]:
    with tempfile.TemporaryDirectory() as folder, without_gpu():
        path = Path(folder) / "model.py"
        path.write_text(text)
        _, instance, captured = load_and_capture(path, {}, None, CHIP)
        return header(Path(name), instance, CHIP), captured, plan_model(captured, CHIP, library=False)


def page_of(text: str, name: str = "model.py") -> Page:
    head, captured, planned = planned_of(text, name)
    return build(head, captured, planned, CHIP)


@pytest.fixture(scope="module")
def page() -> Page:
    return page_of(MIXED)


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return render(page)


# ---- structure


def test_well_formed_and_linked_within_itself(html: str) -> None:
    tree = Tree(html)
    ids = tree.with_attribute("id")
    assert len(ids) == len(set(ids))
    assert all(link.startswith("#") and link[1:] in ids for link in tree.with_attribute("href"))
    for name in ("aria-labelledby", "aria-describedby"):
        assert all(word in ids for value in tree.with_attribute(name) for word in value.split())
    assert not tree.with_attribute("src") and not any(tag in ("script", "link", "img") for tag, _ in tree.elements)
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<code>.*?</code>", "", html, flags=re.DOTALL))


def test_headings_are_in_order(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Tree(html).elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_every_region_is_there(page: Page, html: str) -> None:
    tree = Tree(html)
    ids = set(tree.with_attribute("id"))
    assert [g.name for g in page.graphs] == ["inference", "forward", "backward"]
    for graph in page.graphs:
        assert len(graph.regions) == len(graph.explanation.regions) > 0
        for r in graph.regions:
            assert f"{graph.name}-{r.number}" in ids
            for kernel in r.kernels:
                assert kernel.registers and kernel.registers > 8 and f"<code>{kernel.name}</code>" in html
        assert f'href="#{graph.name}-{graph.regions[0].number}"' in html
        drawn = [b for b in graph.before.boxes if b.kind == "operator"]
        assert len(drawn) == graph.explanation.launches_before
        assert {m for b in graph.after.boxes for m in b.marks} == {
            *(r.number for r in graph.regions),
            *(f.number for f in graph.fallbacks),
        }
    assert "gemm_simt.cuh" in page.headers and "vector.cuh" in page.headers


def test_refusals_and_fallbacks_have_their_reasons(page: Page, html: str) -> None:
    text = re.sub(r"\s+", " ", html)
    assert any(g.fallbacks for g in page.graphs) and any(g.explanation.refusals for g in page.graphs)
    for graph in page.graphs:
        for refusal in graph.explanation.refusals:
            assert refusal["reason"] in text
        for fallback in graph.fallbacks:
            assert f"{fallback.operator}</strong> ({graph.name}): {fallback.reason}" in text


def test_bytes_and_operations_of_a_product() -> None:
    """x [24, 20], weight [16, 20], bias [16] and the result [24, 16], all float32."""
    first = page_of(MODELS["one in a list"]).graphs[0]
    (region,) = first.regions
    assert region.operations == 2 * 24 * 20 * 16 and region.steps > 0
    assert {m.name: (m.bytes, m.written) for m in region.moved if m.written} == {region.moved[-1].name: (1536, True)}
    assert sum(m.bytes for m in region.moved) == region.row.bytes == 4 * (24 * 20 + 16 * 20 + 16 + 24 * 16)
    arrows = {(b.lines[0], b.kind) for b in first.before.boxes}
    assert {("addmm", "operator"), ("relu", "operator"), ("x", "input"), ("result", "result")} <= arrows
    assert "relu from addmm" in first.before.description and "result from relu" in first.before.description
    assert "result from addmm, relu" in first.after.description


def test_sixteen_bit_results_show_what_eager_stores() -> None:
    _, _, (first, *_) = planned_of(MODELS["bfloat16"], "model.py")
    boxes = [b for b in operators(first, ["result"], "#").boxes if b.kind in ("operator", "input")]
    assert len(boxes) == 6 and all("bf16" in b.lines[1] for b in boxes)


def test_steps_that_split_operands_are_kernels() -> None:
    """On Hopper a float32 product is three of fp16, and its roof a third of theirs."""
    linear = MODELS["one in a list"].replace("nn.Linear(20, 16)", "nn.Linear(4096, 4096)")
    _, _, (first, *_) = planned_of(linear.replace("torch.rand(24, 20)", "torch.rand(512, 4096)"), "model.py")
    graph = _graph(first, ["result"], CHIP, {})
    assert [r.row.family.split()[0] for r in graph.regions] == ["split_f16", "gemm_sm90"]
    assert [r.rate_name for r in graph.regions] == ["float32", "float32 by halves"]
    assert graph.regions[0].operations == 512 * 4096 + 4096 * 4096
    assert [b.marks for b in graph.after.boxes if b.kind == "kernel"] == [(1,), (2,)]


def test_names_cannot_write_markup() -> None:
    text = model(f"""
    def __init__(self):
        super().__init__()
        self.add_module({HOSTILE.replace(".py", "")!r}, nn.Linear(20, 16))

    def forward(self, x):
        return torch.relu(self._modules[{HOSTILE.replace(".py", "")!r}](x))
""")
    page = page_of(text, name=f"<b>/{HOSTILE}")
    html = render(page)
    tree = Tree(html)
    assert "<script" not in html and "<b>" not in html
    assert not any(tag in ("script", "b") for tag, _ in tree.elements)
    assert any("<b>/<script>" in data for data in tree.text["code"])


# ---- the file


def request(path: Path, out: Path, *measured: Path) -> Request:
    return Request(path, out, CHIP, None, {}, False, measured)


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a модель.py"
    path.write_text(MODELS["no parameters"])
    out = tmp_path / "page.html"
    found = report(request(path, out), Console(quiet=True))
    first = out.read_text(encoding="utf-8")
    assert "a модель.py" in first and Tree(first)
    assert found["out"] == str(out) and json.dumps(found)
    (kernel,) = found["graphs"][0]["regions"][0]["kernels"]
    assert kernel["registers"] > 8 and "source" not in kernel
    report(request(path, out), Console(quiet=True))
    assert out.read_text(encoding="utf-8") == first  # the same input, the same page

    def stops(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusewright.tools.report.render", stops)
    with pytest.raises(KeyboardInterrupt):
        report(request(path, out), Console(quiet=True))
    assert out.read_text(encoding="utf-8") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a модель.py", "page.html"]


def test_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "model.py", tmp_path / "page.html"
    path.write_text(MODELS["no parameters"])
    named = {"model": "a\udcff.py", "inputs": "", "arch": CHIP.arch}
    monkeypatch.setattr("fusewright.tools.report.header", lambda *_: named)
    report(request(path, out), Console(quiet=True))
    assert r"a\udcff.py" in out.read_text(encoding="utf-8")


def test_never_over_an_input(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODELS["no parameters"])
    for out in (path, tmp_path, tmp_path / "missing" / "page.html"):
        with pytest.raises(OutputNotWritable, match=r"-o|create it"):
            report(request(path, out), Console(quiet=True))
    measured = tmp_path / "verify.json"
    measured.write_text("{}")
    with pytest.raises(OutputNotWritable, match="the input itself"):
        report(request(path, measured, measured), Console(quiet=True))
    assert path.read_text() == MODELS["no parameters"] and measured.read_text() == "{}"


# ---- what was measured

CHECK = {"name": "values", "passed": True, "detail": "worst 0.50× eager's error", "figures": {}}
VERIFIED = {
    "passed": False,
    "simulated": False,
    "reference": "model.py",
    "candidate": "model_new.py",
    "device": "NVIDIA H200",
    "dtype": "float32",
    "checks": [CHECK, {**CHECK, "name": "gradients", "passed": False}],
    "not_checked": ["streams: no GPU"],
}
OUTCOME = {"passed": True, "worst": 0.7, "where": "output", "checked": 4}


def test_checks_of_verify(page: Page, tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text(json.dumps(VERIFIED))
    measured = read_measured(tmp_path / "verify.json")
    html = render(Page(page.head, CHIP, page.graphs, page.roofline, page.headers, (measured,)))
    assert "model_new.py against model.py on NVIDIA H200" in html and "streams: no GPU" in html
    assert html.count(">passed<") == 1 and html.count(">FAILED<") == 1
    assert "Nothing on this page was timed" not in html


def test_checks_in_the_simulator(tmp_path: Path) -> None:
    data = {"passed": False, "simulated": True, "sizes": "batch 37", "plan": OUTCOME, "kernels": None}
    (tmp_path / "verify.json").write_text(json.dumps(data))
    measured = read_measured(tmp_path / "verify.json")
    assert measured.about == "without a GPU, at batch 37" and len(measured.checks) == 1
    (tmp_path / "verify.json").write_text(json.dumps({**data, "kernels": OUTCOME}))
    assert "0.70× the larger" in read_measured(tmp_path / "verify.json").checks[1].detail


def timed(ms: float | None) -> dict[str, Any]:
    return {"ms": ms, "low": ms, "high": ms, "trials": 50, "of_floor": None, "failed": None if ms else "raises"}


BENCHED = {
    "reference": "model.py",
    "candidate": "fusewright",
    "inputs": "float32 [24, 20]",
    "dtype": "the file's own",
    "environment": {"device": "NVIDIA H200"},
    "modes": {
        "forward": {
            "timings": {"eager": timed(0.04), "torch.compile": timed(None), "fusewright": timed(0.01)},
            "best_baseline": "eager",
            "speedup": 4.0,
        }
    },
    "accuracy": {"fusewright": {"ratio": 0.5, "problems": []}},
    "not_measured": ["max-autotune: it fails"],
}


def test_timings_of_bench_are_on_the_roofline(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCHED))
    measured = read_measured(tmp_path / "bench.json")
    head, captured, planned = planned_of(MODELS["no parameters"], "model.py")
    page = build(head, captured, planned, CHIP, [measured])
    assert page.roofline is not None
    (mark,) = [m for m in page.roofline.marks if m.point.measured]
    predicted = next(m for m in page.roofline.marks if m.point.label == "F1")
    assert mark.point.seconds == pytest.approx(1e-5) and mark.x == predicted.x and mark.y > predicted.y
    html = render(page)
    assert "4.00× as fast as eager, the best baseline" in html and "worst 0.50× eager's error" in html.replace(
        "&#39;", "'"
    )
    assert "max-autotune: it fails" in html and "Nothing on this page was timed" not in html
    assert html.count('<td class="n">40 µs</td>') == 1 and html.count('<td class="n">10 µs</td>') == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"checks": [{}]}', '{"modes": {"forward": 3}}'])
def test_what_is_no_measurement(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BadMeasurement, match=r"bad.json .*(bench|verify) --json"):
        read_measured(tmp_path / "bad.json")
    with pytest.raises(BadMeasurement, match="cannot be read"):
        read_measured(tmp_path / "missing.json")


# ---- pictures


def test_layers_leave_no_overlap_and_point_down() -> None:
    edges = [("a", "c"), ("b", "c"), ("c", "d"), ("a", "e"), ("d", "e"), ("f", "e"), ("c", "g")]
    found = layered({key: (40.0 + 10 * i, 20.0) for i, key in enumerate("abcdefg")}, edges)
    boxes = list(found.places.values())
    for i, a in enumerate(boxes):
        assert a.x >= 0 and a.x + a.width <= found.width and a.y + a.height <= found.height
        for b in boxes[i + 1 :]:
            apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
            assert apart, (a, b)
    for source, target in edges:
        assert found.places[source].y + found.places[source].height < found.places[target].y
    assert found.places["f"].y > found.places["c"].y  # just above its only user
    assert len(found.routes) == len(edges)


def test_points_lie_on_the_roofs_and_labels_beside_each_other() -> None:
    memory = Point("M", "copy", "forward", 1e6, 8e6, 8e6 / CHIP.bandwidth)
    arithmetic = Point("A", "product", "forward", 1e12, 1e8, 1e12 / CHIP.fp32)
    slow = Point("S", "measured", "forward", 1e12, 1e8, 4e12 / CHIP.fp32, measured=True)
    found = roofline(CHIP, {"float32": CHIP.fp32}, [memory, arithmetic, arithmetic, slow])
    assert found is not None
    slope, flat = ([tuple(map(float, p.split(","))) for p in line.points.split()] for line in found.roofs)
    a, b, *_, s = found.marks
    assert b.y == pytest.approx(flat[0][1], abs=0.1) and s.y > b.y + 20 and s.x == b.x
    (x0, y0), (x1, y1) = slope
    assert a.y == pytest.approx(y0 + (a.x - x0) / (x1 - x0) * (y1 - y0), abs=0.2)
    assert sorted(label.text for label in found.labels) == ["A A", "M", "S"]
    assert roofline(CHIP, {"float32": CHIP.fp32}, []) is None
    nothing = Point("N", "of no rows", "forward", 0, 8, 1e-9)
    assert roofline(CHIP, {"float32": CHIP.fp32}, [nothing]) is None
    assert roofline(CHIP, {"float32": CHIP.fp32}, [nothing, memory, arithmetic, arithmetic, slow]) == found
    assert all(math.isfinite(m.x + m.y) for m in found.marks)


# ---- a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html, encoding="utf-8")
    return path


# Texts whose contrast with what is behind them is below WCAG's 4.5; SVG text and boxes have fills.
CONTRAST = """(() => {
  const channels = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = channels(c).map(v => { v /= 255;
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const ground = e => { for (; e; e = e.parentElement) {
    if (e.classList.contains('box')) return getComputedStyle(e.querySelector('rect')).fill;
    const c = getComputedStyle(e).backgroundColor; if (channels(c)[3] !== 0) return c }
    return 'rgb(255, 255, 255)' };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    if (![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim())
      || node.closest('title, desc, .skip')) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node instanceof SVGElement ? style.fill : style.color), light(ground(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([node.tagName, node.textContent.slice(0, 30), ratio]);
  }
  return low })()"""
# Elements that reach past the screen although nothing scrolls them.
WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, .skip, title, desc')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
# Texts of pictures that are wider than their box.
CUT = """[...document.querySelectorAll('.box')].filter(g => [...g.querySelectorAll('text')].some(
  t => t.getBBox().width > g.querySelector('rect').getBBox().width + 1)).map(g => g.textContent)"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser: Browser, file: Path, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(file, width=width, dark=dark)
    assert browser.requests == [file.as_uri()] and browser.console == []
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(WIDE) == [] and browser.evaluate(CUT) == []
    assert browser.evaluate(CONTRAST) == []
    shade = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", shade)[0])
    assert red < 60 if dark else red > 200
    browser.screenshot(tmp_path / "page.png", 1000)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_link_in_a_picture_leads_to_the_kernel(browser: Browser, file: Path) -> None:
    browser.open(file, width=390)
    browser.evaluate("document.querySelector('#backward ~ * svg a').dispatchEvent(new MouseEvent('click'))")
    assert browser.evaluate("location.hash.startsWith('#backward-')")
    top = browser.evaluate("document.querySelector(location.hash).getBoundingClientRect().top")
    assert -2 <= top <= 844
