"""Round weights to 8 bits at load and activations token by token, and multiply integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import (
    LayerMethod,
    QuantizedActivation,
    ShardRule,
    WeightLayer,
)
from quire_kernels import int8, ops
from quire_kernels.cpu import products
from quire_kernels.cpu.products import TILE_OUT
from quire_quant.int8 import product

# Weights that are wide at one time while they are rounded.
PIECE_ELEMENTS = 1 << 19


def rounded_pieces(weight: Tensor, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield outputs, from multiples of 16 on, with their int8 values and float32 scales.

    Raises: CheckpointError naming the layer where a weight is not finite.
    """
    rows = max(1, PIECE_ELEMENTS // max(1, weight.shape[1]) // TILE_OUT) * TILE_OUT
    for first in range(0, weight.shape[0], rows):
        own = slice(first, min(first + rows, weight.shape[0]))
        wide = weight[own].float()
        largest = torch.linalg.vector_norm(wide, ord=torch.inf, dim=1)
        if not bool(largest.isfinite().all()):
            raise CheckpointError(
                f"{name}.weight has a NaN or an infinity, which int8 cannot hold. Take another "
                "copy of the checkpoint."
            )
        scale = largest / 127
        scale = torch.where(scale == 0, 1.0, scale)
        yield own, (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_weight(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return int8 values of `weight` [out, in] and float32 scales [out], the largest by 127.

    Raises: CheckpointError naming the layer where a weight is not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for own, piece, scale in rounded_pieces(weight, name):
        values[own], scales[own] = piece, scale
    return values, scales


class Int8Product(LayerMethod):
    """x W^T + b, both rounded symmetrically: W by output, x by token; sums are exact integers."""

    def __init__(self, out_features: int, in_features: int, dtype: str, device: str) -> None:
        self.shape = (out_features, in_features)
        self.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        is_on_cpu = self.device.type == "cpu"
        self.takes_tiles = is_on_cpu and product.takes_tiles(out_features, in_features)
        self.packs = is_on_cpu and not self.takes_tiles and product.packs()
        self.values: Tensor | None = None  # in tiles, or packed where oneDNN multiplies
        self.scales: Tensor | None = None

    def create_weights(self, layer: WeightLayer) -> None:
        """Register `weight` [out_features, in_features] in the model's dtype, without memory."""
        weight = torch.empty(self.shape, dtype=self.dtype, device="meta")
        layer.add_weight("weight", weight, ShardRule(output_dim=0, input_dim=1))

    def finish_loading(self, layer: WeightLayer) -> None:
        """Round, repack for whoever multiplies, and drop the plain weight.

        Raises: CheckpointError naming the layer where a weight is not finite.
        """
        weight, name = layer.get_weight("weight").data, layer.spec.name
        if self.takes_tiles:
            self.values = products.empty_int8_tiles(*self.shape)
            self.scales = torch.empty(self.shape[0])
            for own, values, scales in rounded_pieces(weight, name):
                products.put_int8(self.values, own.start, values)
                self.scales[own] = scales
        else:
            values, self.scales = quantize_weight(weight, name)
            self.values = self.repacked(values)
        layer.drop_weight("weight")

    def repacked(self, values: Tensor) -> Tensor:
        """Return int8 [out_features, in_features] as whoever multiplies wants them."""
        if self.takes_tiles:
            return products.int8_tiles(values)
        return product.pack(values) if self.packs else values

    def loaded_bytes(self, layer: WeightLayer) -> int:
        """Return a byte a weight and four an output."""
        return self.shape[0] * self.shape[1] + 4 * self.shape[0]

    def _loaded(self) -> tuple[Tensor, Tensor]:
        assert self.values is not None, "used before finish_loading"
        assert self.scales is not None
        return self.values, self.scales

    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Round each row of `x`, multiply, and scale back."""
        assert isinstance(x, Tensor)
        values, scales = self._loaded()
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0])
        if self.takes_tiles:
            return products.int8_linear(x.contiguous(), values, scales, bias)
        if not self.packs:
            return self._multiply(int8.quantize(x), bias, x.dtype)
        rounded, x_scales = ops.quantize_rows(x.contiguous())
        if x.shape[0] == 1:
            # One row's scale goes into the product itself, which may then round to bfloat16.
            is_last = bias is None and x.dtype == torch.bfloat16
            dtype = torch.bfloat16 if is_last else torch.float32
            scale = x_scales.item()
            out = product.multiply_packed(rounded, scale, values, scales, dtype)
        else:
            out = product.multiply_packed(rounded, 1.0, values, scales, torch.float32)
            out.mul_(x_scales[:, None])
        if bias is not None:
            out = out.add_(bias)
        return out.to(x.dtype)

    def _multiply(self, rounded: int8.Rounded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Multiply where neither tiles nor oneDNN do: on a GPU, or by PyTorch alone."""
        values, scales = self._loaded()
        out = int8.product(rounded, values, scales, bias, dtype)
        if out is not None:
            return out
        out = product.multiply_signed(rounded[0], values, scales).mul_(rounded[1])
        if bias is not None:
            out = out.add_(bias)
        return out.to(dtype)

    @property
    def rounds_by_token(self) -> bool:
        """Whether each row of inputs has a scale of its own, made anew."""
        return True

    def apply_after_norm(
        self,
        layer: WeightLayer,
        addends: tuple[Tensor, Tensor],
        norm: tuple[Tensor, float],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Norm and round in one pass, on a GPU."""
        x = addends[0]
        if not self.rounds_by_token or not int8.rounds_in_one_pass(x, self.shape[1]):
            return None
        rounded, total = int8.add_rms_norm_quantize(*addends, *norm)
        return self._multiply(rounded, bias, x.dtype), total

    def apply_after_silu_mul(
        self, layer: WeightLayer, gate_up: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Do SiLU, multiply and round in one pass, on a GPU."""
        if not self.rounds_by_token or not int8.rounds_in_one_pass(gate_up, self.shape[1]):
            return None
        return self._multiply(int8.silu_mul_quantize(gate_up), bias, gate_up.dtype)

    def dequantize(self, layer: WeightLayer) -> Tensor:
        """Return values times scales, float32."""
        values, scales = self._loaded()
        if self.takes_tiles:
            values = products.int8_values(values, self.shape[0])
        if not self.packs:
            return values.float() * scales[:, None]
        # A packed weight is read back by multiplying the unit matrix.
        unit = torch.eye(self.shape[1], dtype=torch.uint8) + product.ZERO_POINT
        read = product.multiply_packed(unit, 1.0, values, scales, torch.float32)
        return read.T.contiguous()

    def rounded_input(self, layer: WeightLayer, x: Tensor) -> Tensor | None:
        """Return the rounded rows of `x` times their scales, float64."""
        values, scales = ops.quantize_rows(x.contiguous())
        return (values.double() - product.ZERO_POINT) * scales.double()[:, None]
