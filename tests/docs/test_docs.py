"""Every command in the documents runs, every link in them leads somewhere, and what they list is all there is."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest
from blocks import DOCS, ROOT, Runner, blocks, missing

from fusewright import errors
from fusewright.simulator.errors import SharedMemoryRace

TOUR = DOCS / "tour.md"
PAGES = sorted({*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"} - {TOUR})


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p.name != "CONTRIBUTING.md"], ids=ids)
def test_commands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the tour's model.py at hand where a page lists what became of it, else with one that compiles faster."""
    runner = Runner(tmp_path, monkeypatch, capfd)
    model = next(block.text for block in blocks(TOUR) if block.words == ("model.py",))
    if not any(block.language == "cuda" for block in blocks(page)):
        model = model.replace("self.linear(x)", "x * self.linear.bias")
    Path("model.py").write_text(model, encoding="utf-8")
    for block in blocks(page):
        runner.run(block)


@pytest.mark.parametrize("page", [TOUR, *PAGES], ids=ids)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_every_block_says_what_it_is() -> None:
    """A command in a block without a language would be missed."""
    for page in (TOUR, *PAGES):
        for block in blocks(page):
            assert block.language or not re.search(r"^\s*(fusewright|python|make) ", block.text, re.MULTILINE), (
                f"{page.name}:{block.line}"
            )


def test_every_error_has_its_cure() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    rows = {m[1]: (int(m[2]), m[3]) for m in re.finditer(r"^\| `(\w+)` \| (\d) \| (.+) \|$", text, re.MULTILINE)}
    classes = {
        name: member
        for name, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, errors.FusewrightError) and member is not errors.FusewrightError
    }
    assert set(rows) == set(classes)
    for name, (code, cure) in rows.items():
        assert code == classes[name].exit_code, name
        assert len(cure.split(" | ")) == 2, name


def test_missing_parts_are_found() -> None:
    actual = "one\ntwo\nthree\nfour\n"
    assert missing("one\n…\nthree\nfour\n", actual) is None
    assert missing("two  \n", actual) is None
    assert missing("one\nthree\n", actual) == "one\nthree"
    assert missing("three\n…\none\n", actual) == "one"
    assert missing("on\n", actual) == "on"


def test_the_race_report_is_that_of_the_example(tmp_path: Path) -> None:
    """As debugging-kernels.md says how to plant the race."""
    example, shown = (b for b in blocks(DOCS / "debugging-kernels.md") if "reverse" in b.text and "gdb" not in b.text)
    text = example.text
    for old, new in (("    __syncthreads();\n", ""), ("tile[63 - threadIdx.x]", "tile[threadIdx.x & ~1]")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = tmp_path / "race.py"
    script.write_text(text, encoding="utf-8")
    with pytest.raises(SharedMemoryRace) as race:
        runpy.run_path(str(script))
    *report, _ = shown.text.splitlines()
    assert str(race.value).splitlines()[: len(report)] == report


def test_supported_versions_are_those_of_the_package() -> None:
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python, torch = (re.search(rf'{name}>=([\d.]+)"', package) for name in ('requires-python = "', "torch"))
    assert python and torch
    machines = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert f"Python ≥ {python[1]}, torch ≥ {torch[1]}." in machines
