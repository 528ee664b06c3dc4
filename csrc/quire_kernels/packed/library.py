"""The compiled kernels: for which GPU, of which sources, and how they are called. No torch."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

from quire.errors import BuildError
from quire_kernels import native
from quire_kernels.native import capability_here

FOLDER = Path(__file__).parent / "cuda"
SHARED = FOLDER.parents[1] / "attention/cuda"
LEAST_CAPABILITY = (8, 0)
# Its products of warpgroups exist for no other GPU, older or newer.
HOPPER = (9, 0)
TILE_ROWS = (16, 32, 64, 96, 128, 160, 192, 224, 256)

_POINTERS = "x residual norm total tiles scales zeros bias out partial arrived"
_LONGS = "x_stride residual_stride out_stride scale_stride zero_stride"
_INTEGERS = (
    "rows num_out in_features group_shift dtype gated has_short_scales tile_rows blocks num_sms"
)


class Arguments(ctypes.Structure):
    """The struct of arguments.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _LONGS.split()),
        *((name, ctypes.c_int32) for name in _INTEGERS.split()),
        ("eps", ctypes.c_float),
    )


def library_for(capability: tuple[int, int]) -> native.NativeLibrary:
    """Return the library of a GPU of this compute capability, built or not."""
    is_hopper = capability == HOPPER
    number = f"{capability[0]}{capability[1]}" + "a" * is_hopper
    many = [f"many_rows_{rows}.cu" for rows in TILE_ROWS] if is_hopper else []
    names = ["few_rows.cu", "widen.cu", "entry_points.cu", *many]
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    return native.NativeLibrary(
        name="packed-products",
        sources=tuple(native.Source(path=FOLDER / name) for name in names),
        headers=(
            *sorted((*FOLDER.glob("*.cuh"), *FOLDER.glob("*.h"))),
            *(SHARED / name for name in ("hopper.cuh", "numbers.cuh", "tensor_cores.cuh")),
        ),
        compiler=native.CUDA,
        flags=("-O3", "-std=c++17", target, *(["-DQUIRE_HOPPER"] if is_hopper else [])),
        architecture=f"sm_{number}",
    )


def why_no_build() -> str | None:
    """Return None if they are, or can be, compiled for this machine's GPU, else why not."""
    capability = capability_here()
    if capability is None:
        return "there is no NVIDIA GPU here, or no driver for it"
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, x)) for x in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}; the kernels need {least}"
    return library_for(capability).why_unusable()


def is_built() -> bool:
    """Answer whether nothing is left to compile here: it is, or it cannot be and Triton serves."""
    capability = capability_here()
    return why_no_build() is not None or library_for(capability or HOPPER).is_built()


def build(progress: Callable[[str], None]) -> str:
    """Compile for this machine's GPU. Raises: BuildError with the reason or the first error."""
    begin = time.perf_counter()
    capability = capability_here()
    if capability is None or capability < LEAST_CAPABILITY:
        raise BuildError(f"{why_no_build()}. Build where there is one; it takes half a minute.")
    library = library_for(capability)
    library.build(progress)
    return library.describe(time.perf_counter() - begin)


@functools.cache
def load(capability: tuple[int, int]) -> ctypes.CDLL | None:
    """Return the library of a GPU, None where it is not built; found out once a process."""
    if capability < LEAST_CAPABILITY:
        return None
    library = library_for(capability)
    if not library.is_built():
        return None
    loaded = library.load()
    for name in ("few_rows", "many_rows", "widen"):
        entry = getattr(loaded, f"quire_packed_{name}")
        entry.argtypes = (ctypes.POINTER(Arguments), ctypes.c_void_p)
    loaded.quire_packed_error.restype = ctypes.c_char_p
    return loaded
