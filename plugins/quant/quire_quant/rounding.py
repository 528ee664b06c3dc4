"""Round weights to whole numbers in groups of inputs, on the fly and for checkpoints.

Shared by the methods and quantizers of this package; not a plugin. Weights are float32 [outputs,
inputs], seen as [outputs, groups, inputs of a group]; scales and zero points are float32 [outputs,
groups].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import QuantizerOptions
from quire_quant.packed import pack

# Groups are searched for their range in pieces of so many weights.
PIECE_WEIGHTS = 1 << 20
# A range is tried as it is and narrower, down to about half.
SHRINKS = tuple(1 - step / 20 for step in range(10))
# Scales below this lose bits in float16.
TINY = 2.0**-14


@frozen(kw_only=True)
class Rounding:
    """How groups are rounded: `bits`, symmetric or not, and the least zero point's code.

    `dtype` is the model's: a scale is one of its numbers that float16 holds too, so that readers
    that keep scales in either see the same.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    dtype: str
    least_zero: int = 0

    @property
    def top(self) -> int:
        """Return the greatest code."""
        return 2**self.bits - 1

    def pieces(self, weight: Tensor) -> Tensor:
        """Return a weight seen in its groups."""
        return weight.unflatten(1, (-1, self.group_size or weight.shape[1]))

    def grid(self, groups: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return scales and zero points of groups [..., inputs] for their range, or part of it."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if self.symmetric:
            scales = torch.maximum(-low, high) * (2 * shrink / self.top)
        else:
            scales = (high - low) * (shrink / self.top)
        scales = self.storable(scales)
        if self.symmetric:
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        zeros = (-low * shrink / scales).round().clamp(self.least_zero, self.top)
        return scales, zeros

    def storable(self, scales: Tensor) -> Tensor:
        """Return the nearest scales that may be written."""
        kept = torch.bfloat16 if self.dtype == "bfloat16" else torch.float16
        return scales.clamp(min=TINY).to(kept).float()

    def codes(self, groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return the nearest codes, float32, of groups [..., inputs]."""
        return ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, self.top)

    def rounded(self, groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Return what the nearest codes stand for."""
        return (self.codes(groups, scales, zeros) - zeros[..., None]) * scales[..., None]


@frozen(kw_only=True)
class Codes:
    """A projection that is rounded: codes uint8 [outputs, inputs], scales and zero points."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def round_to_nearest(weight: Tensor, rounding: Rounding) -> Codes:
    """Round each weight to the nearest code of its group's range."""
    groups = rounding.pieces(weight)
    scales, zeros = rounding.grid(groups)
    codes = rounding.codes(groups, scales, zeros).flatten(1).to(torch.uint8)
    return Codes(codes=codes, scales=scales, zeros=zeros)


def search_ranges(weight: Tensor, second: Tensor, rounding: Rounding) -> Codes:
    """Round to nearest in the ranges, narrower ones among them, that change the outputs least.

    The change is that of a group alone, by its inputs' second moments. Source: Lin et al., "AWQ",
    2023, weight clipping.
    """
    groups = rounding.pieces(weight)
    num_groups, size = groups.shape[1:]
    diagonal = second.unflatten(0, (num_groups, size)).unflatten(2, (num_groups, size))
    own = torch.stack([diagonal[g, :, g] for g in range(num_groups)])
    rows = max(1, PIECE_WEIGHTS // weight.shape[1])
    found = [_search_piece(piece, own, rounding) for piece in groups.split(rows)]
    scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    codes = rounding.codes(groups, scales, zeros).flatten(1).to(torch.uint8)
    return Codes(codes=codes, scales=scales, zeros=zeros)


def _search_piece(groups: Tensor, own: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS:
        scales, zeros = rounding.grid(groups, shrink)
        wrong = rounding.rounded(groups, scales, zeros).sub_(groups).transpose(0, 1)
        loss = (wrong @ own).mul_(wrong).sum(-1).T
        if best is None:
            best = loss, scales, zeros
            continue
        is_better = loss < best[0]
        pairs = zip((loss, scales, zeros), best, strict=True)
        new, scales, zeros = (torch.where(is_better, a, b) for a, b in pairs)
        best = new, scales, zeros
    assert best is not None
    return best[1], best[2]


def quantize(
    weight: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight float32 [out, in] to the nearest codes of its groups.

    Returns codes uint8 [out, in], scales float16 [out, num_groups] and zeros uint8 of that shape.
    Codes reach from a group's least to its greatest weight, zero among them. Scales are numbers of
    `dtype` too: products in bfloat16 take less work with those that it holds.
    """
    groups, top = weight.unflatten(1, (-1, group_size)), 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / top).clamp(min=torch.finfo(torch.float16).tiny).to(dtype).half()
    wide = scales.float()
    zeros = (-low / wide).round().clamp(0, top)
    codes = (groups / wide[..., None]).round_().add_(zeros[..., None]).clamp_(0, top)
    return codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Return rows of codes uint8 [rows, n], whose bits fill whole words, as int32."""
    packed = pack(codes, bits)
    # `pack` may keep the strides of a dimension of one element, which `view` then refuses.
    words = packed.new_empty(packed.shape[0], packed.shape[1] // 4, dtype=torch.int32)
    words.view(torch.uint8).copy_(packed)
    return words


def refuse_options(name: str, options: QuantizerOptions, taken: Sequence[str]) -> None:
    """Raise ConfigError for an option that is given and that the method does not take."""
    for option in ("bits", "group_size", "symmetric", "act_order", "damping"):
        if getattr(options, option) is not None and option not in taken:
            spelt = "--" + option.replace("_", "-")
            listed = ", ".join("--" + one.replace("_", "-") for one in taken) or "none"
            raise ConfigError(f"--method {name} does not take {spelt}; it takes: {listed}.")


def bits_of(name: str, options: QuantizerOptions, allowed: Sequence[int], default: int) -> int:
    """Return the bits to write. Raises: ConfigError for others than those allowed."""
    if options.bits is None:
        return default
    if options.bits not in allowed:
        listed = " or ".join(map(str, allowed))
        raise ConfigError(f"--bits is {options.bits}; --method {name} writes {listed}.")
    return options.bits


def group_size_of(options: QuantizerOptions, default: int) -> int | None:
    """Return the inputs of a group, None for all. Raises: ConfigError for what is not served."""
    size = default if options.group_size is None else options.group_size
    if size != -1 and (size < 8 or size % 8):
        raise ConfigError(f"--group-size is {size}; allowed: -1 or a positive multiple of 8.")
    return None if size == -1 else size
