"""How codes of 4 bits lie in tiles, and the product in plain PyTorch.

A tile is 16 outputs by 64 inputs: 32 lanes of four words, a word for each 16 inputs. Lane
4 g + c has what `mma` and `wgmma` want of it as their first factor:

    code of a word    0         1         2         3         4 to 7
    output            g         g + 8     g         g + 8     as 0 to 3
    input             2 c       2 c       2 c + 8   2 c + 8   one further

so that `word >> 4 i & 0x000F000F` are the two neighbours of factor i. Tiles of the same outputs lie
one after another.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor

TILE_OUT, TILE_IN = 16, 64
# Scales and zero points of 32 outputs are what the copy engine takes at least.
STEP_OUT = 32
# Bytes of codes that are repacked at one time.
_SLICE_BYTES = 1 << 20


@frozen(kw_only=True)
class TiledWeight:
    """W of some outputs: (code - zero) * scale, each group of inputs with its own.

    `tiles` int32 [out_features / 16, in_features / 64, 32, 4], `scales` float16
    [num_groups, out_features] and `zeros` uint8 [num_groups, out_features / 2], two a byte, the
    first in the lower bits; the last two may be strided. `has_short_scales`: bfloat16 holds all
    scales, which takes less work in that dtype.
    """

    tiles: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    has_short_scales: bool = False

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.tiles.shape[0] * TILE_OUT

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.tiles.shape[1] * TILE_IN

    def outputs(self, first: int, end: int) -> TiledWeight:
        """Return the weight of some outputs, multiples of 32, in the same memory."""
        return TiledWeight(
            tiles=self.tiles[first // TILE_OUT : end // TILE_OUT],
            scales=self.scales[:, first:end],
            zeros=self.zeros[:, first // 2 : end // 2],
            group_size=self.group_size,
            has_short_scales=self.has_short_scales,
        )


def are_short(scales: Tensor) -> bool:
    """Answer whether bfloat16 holds all scales, of float16. Waits for the device."""
    return torch.equal(scales, scales.bfloat16().half())


def why_not(out_features: int, in_features: int, group_size: int) -> str | None:
    """Return None if such a weight can lie in tiles, else why not."""
    if out_features % STEP_OUT or in_features % TILE_IN:
        return f"{out_features} outputs of {in_features} inputs make no whole tiles"
    is_power = group_size >= 32 and group_size & (group_size - 1) == 0
    if group_size != in_features and not is_power:
        return f"groups of {group_size} are neither all inputs nor a power of two from 32 on"
    return None


def to_tiles(values: Tensor) -> Tensor:
    """Return the tiles of codes uint8 [out_features, in_features / 2], the first in lower bits."""
    rows, width = values.shape
    codes = torch.stack((values & 15, values >> 4), -1)
    codes = codes.view(rows // TILE_OUT, 2, 8, width * 2 // TILE_IN, 4, 2, 4, 2)
    # Outputs are (tile, half, g), inputs (tile, word, half, c, neighbour).
    codes = codes.permute(0, 3, 2, 6, 4, 7, 5, 1).reshape(-1, 2)
    words = (codes[:, 0] | codes[:, 1] << 4).view(torch.int32)
    return words.view(rows // TILE_OUT, width * 2 // TILE_IN, 32, 4)


def tiles_of(values: Tensor) -> Tensor:
    """Return what `to_tiles` does; memory beside that is small, whatever the weight's size."""
    rows, width = values.shape
    shape = (rows // TILE_OUT, width * 2 // TILE_IN, 32, 4)
    tiles = torch.empty(shape, dtype=torch.int32, device=values.device)
    step = max(1, _SLICE_BYTES // (width * TILE_OUT))
    for first in range(0, shape[0], step):
        end = min(first + step, shape[0])
        tiles[first:end] = to_tiles(values[first * TILE_OUT : end * TILE_OUT])
    return tiles


def from_tiles(tiles: Tensor) -> Tensor:
    """Return codes uint8 [out_features, in_features], one a byte."""
    packed = tiles.contiguous().view(torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), -1)
    codes = codes.view(tiles.shape[0], tiles.shape[1], 8, 4, 4, 2, 2, 2)
    codes = codes.permute(0, 7, 2, 1, 4, 6, 3, 5)
    return codes.reshape(tiles.shape[0] * TILE_OUT, tiles.shape[1] * TILE_IN)


def widened(weight: TiledWeight) -> Tensor:
    """Return the weight, float32 [out_features, in_features]."""
    zeros = torch.stack((weight.zeros & 15, weight.zeros >> 4), -1).flatten(1)
    groups = from_tiles(weight.tiles).float().unflatten(1, (weight.scales.shape[0], -1))
    groups.sub_(zeros.T.float()[..., None]).mul_(weight.scales.T.float()[..., None])
    return groups.flatten(1)


def group_shift(weight: TiledWeight) -> int:
    """Return the power of two that a group's inputs are; 31 where all inputs are one."""
    if weight.group_size == weight.in_features:
        return 31
    return int(math.log2(weight.group_size))
