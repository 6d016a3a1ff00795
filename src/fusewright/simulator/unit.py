"""One C++ translation unit out of the sources of many launches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusewright.codegen.launch import LaunchSpec

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"][^>"]+[>"]).*$', re.MULTILINE)
_LINKAGE = re.compile(r'extern\s+"C"(?=\s+(?:static\s+)?__global__)')


@dataclass(frozen=True)
class Source:
    """One distinct kernel source. file: the name under which errors and a debugger show it. kernels: those launched."""

    file: str
    text: str
    kernels: tuple[str, ...]


def distinct_sources(launches: Sequence[LaunchSpec]) -> list[Source]:
    """Returns the sources of the launches, each once, with file names that tell them apart."""
    kernels: dict[str, list[str]] = {}
    for launch in launches:
        names = kernels.setdefault(launch.source, [])
        if launch.kernel not in names:
            names.append(launch.kernel)
    sources: list[Source] = []
    for text, names in kernels.items():
        taken = {source.file for source in sources}
        file = next(f for i in range(len(kernels)) if (f := f"{names[0]}{f'_{i}' if i else ''}.cu") not in taken)
        sources.append(Source(file, text, tuple(names)))
    return sources


def entry_name(source: int, kernel: str) -> str:
    """Returns the symbol that calls `kernel` of source number `source`."""
    return f"fusewright_entry_{source}_{kernel}"


def _launch_bound(source: Source, kernel: str) -> str:
    """Returns the text of the kernel's __launch_bounds__ arguments, or "0"."""
    start = re.search(rf"__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)\s*{kernel}\s*\(", source.text)
    return start[1] if start else "0"


def _wrapped(index: int, source: Source, folder: str) -> str:
    """The source in a namespace of its own, line for line, and an entry point for each kernel."""
    text = _INCLUDE.sub("", source.text)
    text = re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+once.*$", "", text, flags=re.MULTILINE)
    # Sources may define kernels of the same name: inside a namespace, C linkage would make them one.
    text = _LINKAGE.sub("", text)
    space = f"fusewright_source_{index}"
    parts = [f'namespace {space} {{\n#line 1 "{folder}/{source.file}"\n{text}\n#line 1 "entry"\n']
    for kernel in source.kernels:
        bound = f"fusewright_simulator::launch_bounds({_launch_bound(source, kernel)})"
        name = entry_name(index, kernel)
        parts.append(
            f'extern "C" __attribute__((visibility("default"))) void {name}(void* const* arguments) '
            f"{{ fusewright_simulator::call(&{kernel}, arguments); }}\n"
            f'extern "C" __attribute__((visibility("default"))) const unsigned* {name}_parameters() '
            f"{{ return decltype(fusewright_simulator::entry_of(&{kernel}))::kSizes; }}\n"
            f'extern "C" __attribute__((visibility("default"))) const unsigned* {name}_bound() '
            f"{{ static constexpr auto bounds = {bound}; return bounds.data; }}\n"
        )
    return "".join(parts) + f"}}  // namespace {space}\n"


def translation_unit(sources: Sequence[Source], folder: str) -> str:
    """Returns the unit. folder: where the sources are written, so that line numbers name those files."""
    includes = dict.fromkeys(name for source in sources for name in _INCLUDE.findall(source.text))
    head = ['#include "simulator.hpp"', *(f"#include {name}" for name in includes)]
    anchor = (
        'extern "C" { thread_local char fusewright_anchor[64]; }\n'
        'extern "C" __attribute__((visibility("default"))) char* fusewright_shared_anchor() '
        "{ return fusewright_anchor; }\n"
    )
    return "\n".join(head) + "\n" + anchor + "".join(_wrapped(i, s, folder) for i, s in enumerate(sources))
