"""The kernels for a CPU: C++ beside this file, compiled by `quire build cpu`. Imports no torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

from quire_kernels.native import NativeLibrary, Source

_HERE = Path(__file__).parent
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_X86 = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16")}

ISAS = ("plain", "avx2", "avx512", "avx512_bf16")
"""Instruction sets, the plainest first; the library takes the last that the processor has."""


def _library() -> NativeLibrary:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = {"dispatch": (), "plain": (), **(_X86 if is_x86 else {})}
    return NativeLibrary(
        name="cpu",
        sources=tuple(Source(path=_HERE / f"{name}.cpp", flags=own) for name, own in flags.items()),
        headers=tuple(sorted(_HERE.glob("*.h"))),
        flags=("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast"),
        link_flags=("-ldl", "-lm"),
    )


LIBRARY = _library()


def build(progress: Callable[[str], None]) -> str:
    """Compile the library unless it is there. Raises: BuildError."""
    begin = time.perf_counter()
    LIBRARY.build(progress)
    return LIBRARY.describe(time.perf_counter() - begin)
