"""What a launch of a kernel reads, writes and computes, for profiles: never asked in a normal run.

Each function is a kernel's `launch_metadata`: it gets the grid, the compiled kernel's metadata and
the arguments by name, and returns "bytes" that have to move at least, and "flops". Kernels that
Triton has not compiled `tell` theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Cost = dict[str, int]


class _Launch:
    """What Triton's hooks get of a launch."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._told = told

    def get(self) -> Mapping[str, Any]:
        return self._told


def tell(launch: Callable[[], Mapping[str, Any]]) -> None:
    """Tell those who listen to Triton's launches of another: its "name", "bytes" and "flops".

    `launch` is only called where somebody listens.
    """
    if "triton.knobs" not in sys.modules:
        return
    hook = sys.modules["triton.knobs"].runtime.launch_enter_hook
    if hook is not None and getattr(hook, "calls", True):
        hook(_Launch(launch()))


def of_tensors(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count each tensor once, whole, and no FLOPs."""
    return {"bytes": sum(x.nbytes for x in args.values() if isinstance(x, Tensor)), "flops": 0}


def of_norm(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count rows read and written; with a residual three are moved more: it, and the sum twice."""
    rows = args["out_ptr"].nbytes
    return {"bytes": rows * (4 if args["ADDS"] else 2) + args["weight_ptr"].nbytes, "flops": 0}


def of_product(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count the weight and the vectors of a product of one row."""
    return {**of_tensors(grid, metadata, args), "flops": 2 * args["weight_ptr"].numel()}


def of_tiled_product(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count a weight of 4-bit tiles with its scales, and rows of a product with it."""
    rows = args["x_ptr"].shape[0]
    flops = 2 * rows * args["tiles_ptr"].numel() * 8
    return {**of_tensors(grid, metadata, args), "flops": flops}


def of_experts(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count rows and outputs of pairs, and weights as if every expert had a pair; a few have."""
    weight, num_pairs = args["weight_ptr"], args["num_pairs"]
    num_experts = min(len(weight), num_pairs)
    num_bytes = args["x_ptr"].nbytes + args["out_ptr"].nbytes
    num_bytes += num_experts * weight[0].nbytes
    return {"bytes": num_bytes, "flops": 2 * num_pairs * weight[0].numel()}


def of_rotation(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count q, k and v of all tokens, read and written; of a cache nothing else is touched."""
    qkv, dims = args["qkv_ptr"], args["HEAD_DIM"]
    cached = len(qkv) * 2 * args["NUM_KV_HEADS"] * dims
    less = cached * (qkv.element_size() - args["key_ptr"].element_size())
    return {"bytes": 2 * qkv.nbytes - less, "flops": 0}


def of_latent_rows(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count latents read once and written twice, to the cache too, and queries read and written."""
    turned, key = args["turned_ptr"], args["key_ptr"]
    return {"bytes": 3 * key.nbytes + 2 * turned.numel() * turned.element_size(), "flops": 0}


def of_write(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count keys and values of all tokens, read, and written in the cache's dtype."""
    given = args["k_ptr"].numel() + args["v_ptr"].numel()
    sizes = args["k_ptr"].element_size() + args["key_ptr"].element_size()
    return {"bytes": given * sizes, "flops": 0}


def of_attention(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count queries, outputs, and keys and values of each sequence once; two products a pair.

    Reads the device.
    """
    dims = args["HEAD_DIM"] + args["VALUE_DIM"]
    return _of_attention(args, _attended(args), args["GROUP"], (dims, dims))


def of_latent_attention(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count the same where a key is read once for all heads, and its value with it."""
    key = args["LATENT"] + args["ROPE"]
    counted = _attended(args)
    return _of_attention(args, counted, args["NUM_HEADS"], (key, key + args["LATENT"]))


def _of_attention(
    args: Mapping[str, Any], counted: tuple[int, int, int], group: int, widths: tuple[int, int]
) -> Cost:
    """Return the cost of tokens, keys and pairs; `widths` of what is cached, and of q and out."""
    num_tokens, num_keys, num_pairs = counted
    heads, (cached, moved) = args["NUM_HEADS"], widths
    num_bytes = num_keys * (heads // group) * cached * args["cache_ptr"].element_size()
    num_bytes += num_tokens * heads * moved * args["q_ptr"].element_size()
    return {"bytes": num_bytes, "flops": 2 * num_pairs * heads * moved}


def _attended(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how many tokens, keys and pairs of both a launch has."""
    if args["SINGLE"]:
        items = args["items_ptr"][: int(args["num_items_ptr"])].long()
        num_keys = num_pairs = int((items[:, 2] - items[:, 1]).sum())
        return int(items[:, 0].unique().numel()), num_keys, num_pairs
    return _tiled(args)


def _tiled(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return tokens, keys and pairs of the sequences that have tiles."""
    tiles = args["items_ptr"]
    sequences = tiles[1 : 1 + int(tiles[0, 0]), 0].unique().long()
    starts, window = args["starts_ptr"].long(), args["WINDOW"]
    query_lens = starts[sequences + 1] - starts[sequences]
    seq_lens = args["seq_lens_ptr"][sequences].long()
    num_pairs = num_keys = 0
    for query_len, seq_len in torch.stack((query_lens, seq_lens), 1).tolist():
        first, last = seq_len - query_len + 1, seq_len  # keys that the tokens see without a window
        if window is None or window >= last:
            num_pairs += (first + last) * query_len // 2
            num_keys += seq_len
            continue
        whole = min(max(window - first, 0), query_len)  # tokens that the window leaves alone
        num_pairs += (2 * first + whole - 1) * whole // 2 + (query_len - whole) * window
        num_keys += min(seq_len, query_len + window - 1)
    return int(query_lens.sum()), num_keys, num_pairs


def of_merge(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count the partial results of sequences that were split, and what becomes of them.

    Reads the device.
    """
    splits = args["first_items_ptr"][: grid[1] + 1].diff()
    splits = splits[splits > 1]
    row = args["NUM_HEADS"] * args["VALUE_DIM"]
    written = int(splits.numel()) * row * args["out_ptr"].element_size()
    return {"bytes": int(splits.sum()) * (row + args["NUM_HEADS"]) * 4 + written, "flops": 0}


def of_rounding(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count what rows in 8 bits are made of, and they; after a norm the sum is moved as well."""
    values = args["values_ptr"]
    reads = {"plain": 1, "gate": 2, "norm": 3}[args["SOURCE"]]
    num_bytes = values.numel() * (1 + reads * args["x_ptr"].element_size())
    return {"bytes": num_bytes + args["scales_ptr"].nbytes, "flops": 0}


def of_rows_product(grid: Any, metadata: Any, args: Mapping[str, Any]) -> Cost:
    """Count the weight, rows and outputs of a product once; sums of parts stay in the L2."""
    tensors = {k: v for k, v in args.items() if k not in ("part_ptr", "counts_ptr")}
    flops = 2 * args["weight_ptr"].numel() * args["num_rows"]
    return {**of_tensors(grid, metadata, tensors), "flops": flops}
