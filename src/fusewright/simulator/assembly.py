"""Lays out shared memory in the compiler's assembly, and reads from it what each kernel uses.

`__shared__` variables are thread-local variables of the module. Between them go guard bytes, so that an overrun of one
does not land in the next; `extern __shared__` arrays, which nobody defines, become names of one region.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GUARD_BYTES = 256
DYNAMIC_ALIGNMENT = 16  # all that CUDA promises: what needs more must see to it
ANCHOR = "fusewright_anchor"
_SYMBOL = r"[A-Za-z_.][\w.$]*"
# Uses of a thread-local symbol: x86-64 writes name@model, aarch64 :model:name.
_TLS_USE = re.compile(
    rf"({_SYMBOL})@(?:tlsgd|tlsld|dtpoff|gottpoff|tpoff|tlsdesc|tlscall|TLSGD|TLSLD|DTPOFF|GOTTPOFF|TPOFF|TLSDESC)\b"
    rf"|:(?:tlsdesc|tlsdesc_lo12|gottprel|gottprel_lo12|tlsgd|tlsgd_lo12|dtprel\w*|tprel\w*):({_SYMBOL})"
)
_FUNCTION = re.compile(rf"^\t\.type\t({_SYMBOL}), ?@function$", re.MULTILINE)
_TOKEN = re.compile(_SYMBOL)


@dataclass(frozen=True)
class Assembly:
    """text: ready for the assembler. variables: symbol → bytes of every static variable in shared memory.
    dynamic: the symbols of the dynamic region. uses: kernel entry → the symbols that it can reach.
    """

    text: str
    variables: Mapping[str, int]
    dynamic: tuple[str, ...]
    uses: Mapping[str, frozenset[str]]


def lay_out(text: str, entries: Iterable[str], dynamic_bytes: int) -> Assembly:
    """Adds guards and the dynamic region (dynamic_bytes long) to the assembly `text` of a translation unit."""
    text, variables = _add_guards(text)
    used = {a or b for a, b in _TLS_USE.findall(text)}
    dynamic = tuple(sorted(used - variables.keys() - {ANCHOR}))
    if dynamic:
        labels = "".join(f"\t.globl\t{n}\n\t.hidden\t{n}\n\t.type\t{n}, %object\n{n}:\n" for n in dynamic)
        text += (
            '\n\t.section\t.tbss.fusewright_dynamic,"awT",%nobits\n\t.balign\t1024\n'
            f"\t.zero\t{DYNAMIC_ALIGNMENT}\n{labels}\t.zero\t{dynamic_bytes + GUARD_BYTES}\n"
        )
    variables.pop(ANCHOR, None)
    return Assembly(text, variables, dynamic, _reachable(text, entries))


def _add_guards(text: str) -> tuple[str, dict[str, int]]:
    """Returns the text with guard bytes behind every thread-local variable, and the variables' own sizes."""
    sizes: dict[str, int] = {}
    lines = text.split("\n")
    inside = False
    symbol = ""
    for i, line in enumerate(lines):
        if line.startswith(("\t.section", "\t.text", "\t.data", "\t.bss")):
            inside = ".tbss" in line
        elif inside and (size := re.fullmatch(rf"\t\.size\t({_SYMBOL}), (\d+)", line)):
            sizes[size[1]] = int(size[2])
        elif inside and line.endswith(":"):
            symbol = line[:-1]
        elif inside and symbol and (zero := re.fullmatch(r"\t\.zero\t(\d+).*", line)):
            sizes.setdefault(symbol, int(zero[1]))
            lines[i] = f"\t.zero\t{int(zero[1]) + GUARD_BYTES}"
            symbol = ""
    return "\n".join(lines), sizes


def _reachable(text: str, entries: Iterable[str]) -> dict[str, frozenset[str]]:
    """Returns, for each entry, every symbol mentioned by a function that it can reach by calls."""
    mentions: dict[str, set[str]] = {}
    for function in _FUNCTION.finditer(text):
        end = text.find(f"\n\t.size\t{function[1]}, ", function.end())
        mentions[function[1]] = set(_TOKEN.findall(text, function.end(), end))
    result = {}
    for entry in entries:
        seen: set[str] = set()
        todo = [entry]
        while todo:
            for symbol in mentions.get(todo.pop(), ()):
                if symbol not in seen:
                    seen.add(symbol)
                    todo.append(symbol)
        result[entry] = frozenset(seen)
    return result


def variable_name(symbol: str) -> str:
    """Returns a variable's own name out of its mangled symbol: "_ZZN2fw3runEvE4tile" → "tile"."""
    for match in re.finditer(r"\d+", symbol):
        length = int(match[0])
        name = symbol[match.end() : match.end() + length]
        rest = symbol[match.end() + length :]
        if symbol.startswith("_ZZ") and symbol[match.start() - 1] != "E":
            continue  # within the function's name: "_ZZN11source_12f2vE1x" holds a 12 that is no length
        if len(name) == length and re.fullmatch(r"E?(?:_\d+|__\d+_|\.\d+)?", rest):
            return name
    return symbol
