"""The library's structs and functions as ctypes sees them; `interface.h` says what they mean."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

from quire_kernels.cpu import ISAS, LIBRARY

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
SPLIT, TILE_ROWS, ITEM_SIZE = 256, 32, 8


class Spec(ctypes.Structure):
    """What the layers of a group share."""

    _fields_ = (
        *((name, c_int32) for name in ("dtype", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("value_dim", "block_size", "causal", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("isa", "num_threads")),
    )


class Step(ctypes.Structure):
    """A step that was cut into items, and the room that they need."""

    _fields_ = (
        *((name, c_void_p) for name in ("block_table", "seq_lens", "starts")),
        *((name, c_int64) for name in ("table_stride", "num_items", "num_threads")),
        *((name, c_int64) for name in ("scratch_size", "part_size")),
        *((name, c_void_p) for name in ("items", "num_parts", "finished", "scratch", "parts")),
    )


class AttendCall(ctypes.Structure):
    """One layer's tensors."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "cache", "out", "lse", "sinks", "alibi_slopes")),
        *((name, c_int64) for name in ("q_token", "q_head", "block_bytes")),
    )


class WriteCall(ctypes.Structure):
    """One layer's new keys and values; with queries, what is done to them first."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "q_out", "cache", "slots", "positions")),
        *((name, c_void_p) for name in ("cos", "sin", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("num_tokens", "q_token", "k_token", "k_head")),
        *((name, c_int64) for name in ("v_token", "v_head", "block_bytes", "rotary_half")),
        ("eps", c_float),
    )


class RowsCall(ctypes.Structure):
    """Rows of a norm, an activation or a quantization."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "residual", "weight", "out")),
        *((name, c_int64) for name in ("num_rows", "size")),
        ("eps", c_float),
        ("scales", c_void_p),
    )


class Int8Call(ctypes.Structure):
    """A product of 8-bit integers."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "bias", "out", "tiles", "scales", "values")),
        *((name, c_void_p) for name in ("x_scales", "sums")),
        *((name, c_int64) for name in ("num_rows", "inputs", "outputs")),
    )


class PackedCall(ctypes.Structure):
    """A product with packed weights, or these made wide."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "bias", "order", "out", "values", "zeros", "scales")),
        ("wide", c_void_p),
        *((name, c_int64) for name in ("num_rows", "inputs", "outputs", "group_size", "bits")),
        *((name, c_int64) for name in ("x_stride", "out_stride", "value_stride")),
        *((name, c_int64) for name in ("scale_group", "scale_stride")),
        *((name, c_int64) for name in ("zero_group", "zero_stride")),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "quire_has_isa": (c_int, (c_int,)),
    "quire_has_threads": (c_int, ()),
    "quire_scratch_size": (c_int64, (POINTER(Spec),)),
    "quire_part_size": (c_int64, (POINTER(Spec),)),
    "quire_cut": (
        c_int,
        (POINTER(Spec), *[c_void_p] * 2, c_int, *[c_void_p] * 2, c_int64, c_void_p),
    ),
    "quire_attend": (None, (POINTER(Spec), POINTER(Step), POINTER(AttendCall))),
    "quire_write": (None, (POINTER(Spec), POINTER(WriteCall))),
    "quire_norm": (None, (c_int, c_int, POINTER(RowsCall), c_int)),
    "quire_silu_mul": (None, (c_int, c_int, POINTER(RowsCall), c_int)),
    "quire_quantize": (None, (c_int, c_int, POINTER(RowsCall), c_int)),
    "quire_int8": (None, (c_int, c_int, POINTER(Int8Call), c_int)),
    "quire_packed_width": (c_int64, (c_int, POINTER(PackedCall))),
    "quire_packed": (None, (c_int, c_int, POINTER(PackedCall), c_int)),
    "quire_widen": (None, (c_int, c_int, POINTER(PackedCall), c_int)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library with its signatures, built first where it has to be. Raises: BuildError.

    PyTorch has to be imported before: the library uses the threads that it has.
    """
    found = LIBRARY.load()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


@functools.cache
def best_isa() -> int:
    """Return the number of the best instruction set that this processor has."""
    return max(number for number in range(len(ISAS)) if has_isa(number))


def has_isa(number: int) -> bool:
    """Answer whether this processor has an instruction set, and the library its kernels."""
    return bool(library().quire_has_isa(number))
