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

FOLDER = Path(native.__file__).parents[1] / "attention/cuda"
HEAD_DIMS = (64, 96, 128, 256)
LEAST_CAPABILITY = (8, 0)
# Its products of warpgroups exist for no other GPU, older or newer.
HOPPER = (9, 0)
HOPPER_HEAD_DIMS = (64, 128, 256)
QUANTIZED_HEAD_DIMS = (64, 128, 256)

_POINTERS = """q cache out lse sinks k_scale v_scale block_table seq_lens starts items first_items
    arrived partial partial_lse tiles wide wide_blocks wide_table"""
_LONGS = """q_stride_token q_stride_head out_stride block_stride table_stride wide_stride num_tokens
    num_blocks"""
_INTEGERS = """num_heads num_kv_heads head_dim block_size window dtype kv_dtype num_rows max_items
    few_extra few_chunk num_extra chunk most_tiles most_wide num_sms"""


class Arguments(ctypes.Structure):
    """The struct of arguments.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _LONGS.split()),
        *((name, ctypes.c_int32) for name in _INTEGERS.split()),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def library_for(capability: tuple[int, int], *, with_hopper: bool = True) -> native.NativeLibrary:
    """Return the library of a GPU of this compute capability, built or not.

    `with_hopper` False leaves out what only Hopper GPUs have, which tests use.
    """
    is_hopper = capability == HOPPER and with_hopper
    number = f"{capability[0]}{capability[1]}" + "a" * is_hopper
    dims = [f"heads_{dim}.cu" for dim in HEAD_DIMS]
    hopper = [f"prefill_hopper_{dim}.cu" for dim in HOPPER_HEAD_DIMS] if is_hopper else []
    quantized = [f"heads_{dim}_quantized.cu" for dim in QUANTIZED_HEAD_DIMS]
    names = ["plan.cu", "widen.cu", "entry_points.cu", *dims, *quantized, *hopper]
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    return native.NativeLibrary(
        name="cuda-attention",
        sources=tuple(native.Source(path=FOLDER / name) for name in names),
        headers=tuple(sorted((*FOLDER.glob("*.cuh"), *FOLDER.glob("*.h")))),
        compiler=native.CUDA,
        flags=("-O3", "-std=c++17", target, *(["-DQUIRE_HOPPER"] if is_hopper else [])),
        architecture=f"sm_{number}",
    )


def why_unusable() -> str | None:
    """Return None if there is a GPU that the kernels are, or can be, compiled for."""
    capability = capability_here()
    if capability is None:
        return "there is no NVIDIA GPU here, or no driver for it"
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, x)) for x in (capability, LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}; the kernels need {least}"
    return library_for(capability).why_unusable()


def is_built() -> bool:
    """Answer whether the library for this machine's GPU is there."""
    capability = capability_here()
    return capability is not None and library_for(capability).is_built()


def build(progress: Callable[[str], None]) -> str:
    """Compile for this machine's GPU. Raises: BuildError with the reason or the first error."""
    begin = time.perf_counter()
    capability = capability_here()
    if capability is None or capability < LEAST_CAPABILITY:
        raise BuildError(f"{why_unusable()}. Build where there is one; it takes a minute.")
    library = library_for(capability)
    library.build(progress)
    return library.describe(time.perf_counter() - begin)


@functools.cache
def load(capability: tuple[int, int], *, with_hopper: bool = True) -> ctypes.CDLL:
    """Return the library of a GPU, built first where it has to be. Raises: BuildError."""
    loaded = library_for(capability, with_hopper=with_hopper).load()
    for name in ("plan", "widen", "decode", "prefill"):
        entry = getattr(loaded, f"quire_attention_{name}")
        entry.argtypes = (ctypes.POINTER(Arguments), ctypes.c_void_p)
    loaded.quire_attention_error.restype = ctypes.c_char_p
    return loaded
