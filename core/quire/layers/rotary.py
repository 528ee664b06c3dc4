"""Tables of cosines and sines for rotary embeddings, and their plain application."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quire.interfaces.rope import RopeParameters


class RotaryTable:
    """Rotate queries and keys by position; one table serves all layers of a model.

    For fused kernels, and part of the versioned interface:
        cos, sin      float32 [max_len, rotary_dim / 2], attention scaling included
        rotary_dim    so many of a head's first dimensions are rotated: dimension i < rotary_dim / 2
                      together with i + rotary_dim / 2
        head_dim      the size of a head
        is_paired     dimension 2 i turns with 2 i + 1 instead, in tables of latent attention
    A kernel rounds cosine and sine to the activations' dtype first, as Transformers does.

    Row p depends on p alone, so that any chunking of a prompt gives the same tokens. With dynamic
    NTK scaling, row p at or beyond `max_position_embeddings` has the frequencies for a length of
    p + 1, which is what Transformers' `generate` computes when a prompt within the limit grows
    past it (a prompt that is itself longer gets those of its whole length there). LongRoPE takes
    its long factors for all rows if `max_len` exceeds the original length, as vLLM does.
    Source: Su et al., "RoFormer", 2021.
    """

    is_paired: ClassVar[bool] = False

    def __init__(self, cos: Tensor, sin: Tensor, head_dim: int, dtype: torch.dtype) -> None:
        self.cos = cos
        self.sin = sin
        self.head_dim = head_dim
        self.rotary_dim = 2 * cos.shape[1]
        self._dtype = dtype
        self._rows: Tensor | None = None

    @classmethod
    def from_parameters(
        cls,
        parameters: RopeParameters,
        head_dim: int,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> RotaryTable:
        """Build the table for positions below `max_len`, for activations of `dtype`."""
        dim = parameters.rotary_dim(head_dim)
        positions = torch.arange(max_len, device=device, dtype=torch.float32)
        if parameters.rope_type == "dynamic":
            frequencies = _dynamic_frequencies(parameters, dim, positions)
        else:
            frequencies = inverse_frequencies(parameters, dim, max_len, device)
        angles = positions[:, None] * frequencies
        scaling = parameters.attention_scaling
        return cls(angles.cos() * scaling, angles.sin() * scaling, head_dim, dtype)

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return the rotated `heads` [num_tokens, num_heads, head_dim], which may be strided.

        `positions` int32 or int64 [num_tokens].
        """
        # out = x * [cos, cos] + swapped(x) * [-sin, sin], with both factors of a position in one
        # row. 26 us for [1, 6, 64] and 49 us for [32, 6, 64] on one core in float32, against 67
        # and 91 us for the two halves apart.
        cos, sin = self._table().index_select(0, positions).unbind(1)
        if self.rotary_dim == self.head_dim:
            return torch.addcmul(heads * cos, heads.roll(self.rotary_dim // 2, -1), sin)
        turned, rest = heads.split((self.rotary_dim, self.head_dim - self.rotary_dim), -1)
        turned = torch.addcmul(turned * cos, turned.roll(self.rotary_dim // 2, -1), sin)
        return torch.cat((turned, rest), dim=-1)

    def in_dtype(self, dtype: torch.dtype) -> RotaryTable:
        """Return the same table on the CPU, of this one's rounded numbers, for activations of it.

        For checks: what is computed with it in float64 is what kernels should come near to.
        """
        cos, sin = (x.cpu().to(self._dtype).to(dtype) for x in (self.cos, self.sin))
        return type(self)(cos, sin, self.head_dim, dtype)

    def _table(self) -> Tensor:
        """Return [cos, cos] and [-sin, sin]: [max_len, 2, 1, rotary_dim] in the model's dtype.

        Made when first used: backends with a fused kernel never need it.
        """
        if self._rows is None:
            cos, sin = self.cos.to(self._dtype), self.sin.to(self._dtype)
            rows = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1)
            self._rows = rows[:, :, None]
        return self._rows


class PairedRotaryTable(RotaryTable):
    """Rotate dimension 2 i together with 2 i + 1, of heads that turn as a whole."""

    is_paired = True

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return the rotated `heads` [num_tokens, num_heads, head_dim], all of whose dims turn."""
        cos, sin = self._table().index_select(0, positions).unbind(1)
        swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(heads * cos, swapped, sin)

    def _table(self) -> Tensor:
        """Return cosines, each twice, and sines, each first negated: [max_len, 2, 1, head_dim]."""
        if self._rows is None:
            cos, sin = self.cos.to(self._dtype), self.sin.to(self._dtype)
            pairs = torch.stack((torch.stack((cos, cos), 2), torch.stack((-sin, sin), 2)), 1)
            self._rows = pairs.flatten(2)[:, :, None]
        return self._rows


def inverse_frequencies(
    parameters: RopeParameters, dim: int, max_len: int, device: torch.device | str
) -> Tensor:
    """Return the angle per position of each pair of dimensions: float32 [dim / 2].

    Not for dynamic scaling, where it changes with the position.
    """
    exponents = _exponents(dim, device)
    plain = 1.0 / parameters.rope_theta**exponents
    match parameters.rope_type:
        case "linear":
            return plain / parameters.context_factor
        case "llama3":
            return _llama3_frequencies(parameters, plain)
        case "yarn":
            return _yarn_frequencies(parameters, exponents, dim)
        case "longrope":
            return _longrope_frequencies(parameters, exponents, max_len)
    return plain


def _exponents(dim: int, device: torch.device | str) -> Tensor:
    return torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim


def _dynamic_frequencies(parameters: RopeParameters, dim: int, positions: Tensor) -> Tensor:
    """Return float32 [max_len, dim / 2]: the base grows with the length beyond the limit.

    Source: bloc97 and emozilla, "Dynamically scaled RoPE", 2023.
    """
    limit, factor = parameters.max_position_embeddings, parameters.context_factor
    lengths = (positions + 1).clamp_(min=limit)
    growth = (factor * lengths / limit - (factor - 1)) ** (dim / (dim - 2))
    bases = parameters.rope_theta * growth
    return 1.0 / bases[:, None] ** _exponents(dim, positions.device)


def _llama3_frequencies(parameters: RopeParameters, plain: Tensor) -> Tensor:
    """Slow long waves down by the factor, leave short ones, blend in between.

    Source: Grattafiori et al., "The Llama 3 herd of models", 2024, and its reference code.
    """
    low, high = parameters.low_freq_factor, parameters.high_freq_factor
    original = parameters.original_max_position_embeddings
    assert low is not None, parameters
    assert high is not None, parameters
    assert original is not None, parameters
    wavelengths = 2 * math.pi / plain
    # 0 for waves that are slowed down wholly, 1 for those that are left alone.
    kept = ((original / wavelengths - low) / (high - low)).clamp_(0, 1)
    return (1 - kept) * plain / parameters.context_factor + kept * plain


def _yarn_frequencies(parameters: RopeParameters, exponents: Tensor, dim: int) -> Tensor:
    """Interpolate dimensions that turn rarely, leave those that turn often, ramp in between.

    Source: Peng et al., "YaRN: efficient context window extension", 2023, 3.2.
    """
    original, theta = parameters.original_max_position_embeddings, parameters.rope_theta
    assert original is not None, parameters

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension_of(parameters.beta_fast or 32)
    last = dimension_of(parameters.beta_slow or 1)
    if parameters.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    indices = torch.arange(dim // 2, device=exponents.device, dtype=torch.float32)
    kept = 1 - ((indices - first) / width).clamp_(0, 1)
    powers = theta**exponents
    slowed = 1.0 / (parameters.context_factor * powers)
    return slowed * (1 - kept) + (1.0 / powers) * kept


def _longrope_frequencies(parameters: RopeParameters, exponents: Tensor, max_len: int) -> Tensor:
    """Divide each frequency by its own factor. Source: Ding et al., "LongRoPE", 2024."""
    original = parameters.original_max_position_embeddings
    assert original is not None, parameters
    factors = parameters.long_factor if max_len > original else parameters.short_factor
    divisors = torch.tensor(factors, device=exponents.device, dtype=torch.float32)
    return 1.0 / (divisors * parameters.rope_theta**exponents)
