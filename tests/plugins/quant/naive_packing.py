"""Checkpoints of GPTQ and AWQ, written bit by bit from what the formats are said to be."""

from __future__ import annotations

import numpy as np
import torch
from attrs import frozen
from torch import Tensor


@frozen(kw_only=True)
class Rounded:
    """Codes [out, in] of a weight; zeros and scales [out, groups]; the group of each input."""

    bits: int
    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        """What they stand for, float64 [out, in]."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return (self.codes.double() - zeros.double()) * scales.double()


def round_weight(weight: Tensor, bits: int, groups: Tensor, *, symmetric: bool = False) -> Rounded:
    """Round a weight [out, in] to nearest, each group between its least and greatest value."""
    num_groups = int(groups.max()) + 1
    zeros = torch.zeros(len(weight), num_groups, dtype=torch.int64)
    scales = torch.zeros(len(weight), num_groups, dtype=torch.float16)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    top = 2**bits - 1
    for group in range(num_groups):
        mine = weight[:, groups == group].float()
        low, high = mine.amin(1).clamp(max=0), mine.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / top).clamp(min=2**-14).half()
        zero = torch.full_like(low, 2 ** (bits - 1))
        if not symmetric:
            zero = (-low / scale.float()).round()
        rounded = (mine / scale.float()[:, None]).round() + zero[:, None]
        codes[:, groups == group] = rounded.clamp(0, top).long()
        zeros[:, group], scales[:, group] = zero.long(), scale
    return Rounded(bits=bits, codes=codes, zeros=zeros, scales=scales, groups=groups)


def groups_of(in_features: int, group_size: int, *, shuffled: int | None = None) -> Tensor:
    """Return each input's group: one after another, or in the order of a seed."""
    size = in_features if group_size == -1 else group_size
    groups = torch.arange(in_features) // size
    if shuffled is None:
        return groups
    return groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(shuffled))]


def words_of(codes: Tensor, bits: int) -> Tensor:
    """Write rows of codes bit by bit, lowest first, into int32 [rows, n * bits / 32]."""
    bit_rows = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    flat = bit_rows.reshape(len(codes), -1).astype(np.uint8)
    packed = np.packbits(flat, axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def gptq_tensors(rounded: Rounded, *, version: int = 1) -> dict[str, Tensor]:
    """Return a projection's tensors; version 1 stores zero points minus one."""
    stored = (rounded.zeros - (1 if version == 1 else 0)) % 2**rounded.bits
    return {
        "qweight": words_of(rounded.codes, rounded.bits).T.contiguous(),
        "qzeros": words_of(stored.T, rounded.bits),
        "scales": rounded.scales.T.contiguous(),
        "g_idx": rounded.groups.int(),
    }


def awq_words(codes: Tensor) -> Tensor:
    """Return int32 [n, outputs / 8]: outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, output::8].long() << (4 * place)
    return torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """Return a projection's tensors."""
    return {
        "qweight": awq_words(rounded.codes.T),
        "qzeros": awq_words(rounded.zeros.T),
        "scales": rounded.scales.T.contiguous(),
    }
