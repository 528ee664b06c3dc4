"""Numbers in e4m3 by a search of all of them, and checkpoints in each format, in float64."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.interfaces.quantization import EncodedWeight


def all_numbers() -> Tensor:
    """Return the finite numbers of e4m3 from 0 up, by the format's definition."""
    codes = torch.arange(0x7F)
    exponent, mantissa = codes // 8, (codes % 8).double()
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7).double()
    return torch.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)


NUMBERS = all_numbers()
MIDDLES = (NUMBERS[1:] + NUMBERS[:-1]) / 2


def nearest(x: Tensor) -> Tensor:
    """Return float64: the nearest number of each element, the even one of two, at most 448."""
    size = x.double().abs()
    above = torch.searchsorted(MIDDLES, size)
    is_tie = (above < len(MIDDLES)) & (MIDDLES[above.clamp(max=len(MIDDLES) - 1)] == size)
    found = torch.where(is_tie & (above % 2 == 1), above + 1, above)
    return NUMBERS[found].copysign(x.double())


def rounded_rows(x: Tensor, *, group: int | None = None, largest: float | None = None) -> Tensor:
    """Return float64 what rows, or groups in them, become with a scale that takes them to 448."""
    pieces = []
    for piece in x.float().split(group or max(1, x.shape[1]), dim=1):
        extreme = piece.abs().amax(1, keepdim=True)
        if largest is not None:
            extreme = extreme.clamp(max=largest)
        scale = torch.where(extreme > 0, extreme / 448.0, 1.0)
        pieces.append(nearest(piece / scale) * scale.double())
    return torch.cat(pieces, 1)


def rounded_static(x: Tensor, scale: float) -> Tensor:
    """Return float64 what becomes of inputs with one scale."""
    wide = torch.tensor(scale, dtype=torch.float32)
    return nearest(x.float() / wide) * wide.double()


@frozen(kw_only=True)
class Form:
    """A checkpoint's format: its `config`, and how weights and inputs are kept.

    `weight`: tensor, channel or block; `inputs`: token, group, static or plain.
    """

    config: dict[str, Any]
    weight: str
    inputs: str
    scale_name: str = "weight_scale"
    block: tuple[int, int] = (128, 128)
    input_scale: float = 0.02
    scale_shape: tuple[int, ...] = (1,)
    largest: float | None = None

    def encode(self, weight: Tensor) -> EncodedWeight:
        """Return the tensors of a projection and the weight that they stand for."""
        height, width = self.extent(weight)
        scales = torch.stack(
            [
                torch.stack([block.abs().max() / 448 for block in rows.split(width, 1)])
                for rows in weight.float().split(height)
            ]
        )
        wide = scales.repeat_interleave(height, 0)[: weight.shape[0]]
        wide = wide.repeat_interleave(width, 1)[:, : weight.shape[1]]
        values = nearest(weight / wide)
        stored = scales.reshape(self.scale_shape) if self.weight == "tensor" else scales
        tensors = {"weight": values.to(torch.float8_e4m3fn), self.scale_name: stored}
        if self.inputs == "static":
            tensors["input_scale"] = torch.full(self.scale_shape, self.input_scale)
        return EncodedWeight(tensors=tensors, weight=values * wide.double())

    def extent(self, weight: Tensor) -> tuple[int, int]:
        """Return how many outputs and inputs share a scale."""
        outputs, inputs = weight.shape
        return {"tensor": (outputs, inputs), "channel": (1, inputs), "block": self.block}[
            self.weight
        ]

    def rounded_input(self, x: Tensor) -> Tensor:
        """Return float64 what becomes of inputs."""
        if self.inputs == "plain":
            return x.double()
        if self.inputs == "static":
            return rounded_static(x, self.input_scale)
        group = self.block[1] if self.inputs == "group" else None
        return rounded_rows(x, group=group, largest=self.largest)


def hugging_face(**keys: Any) -> dict[str, Any]:
    """Return a `quantization_config` of quant_method fp8."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **keys}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **keys: Any) -> Any:
    """Return a `quantization_config` of compressed-tensors."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "dynamic": False, **weights},
        "input_activations": None if inputs is None else {**number, **inputs},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        **keys,
    }


TOKEN = {"strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}
SMALL_BLOCKS = hugging_face(weight_block_size=[16, 32])
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
BLOCK_STRUCTURE = {"strategy": "block", "block_structure": [128, 128]}
GROUP = {"strategy": "group", "group_size": 128, "dynamic": True}

FORMS = {
    "fp8-blocks": Form(
        config=hugging_face(weight_block_size=[128, 128], modules_to_not_convert=["lm_head"]),
        weight="block",
        inputs="group",
        scale_name="weight_scale_inv",
    ),
    "fp8-small-blocks": Form(
        config=SMALL_BLOCKS,
        weight="block",
        inputs="group",
        scale_name="weight_scale_inv",
        block=(16, 32),
    ),
    "fp8-tensor": Form(config=hugging_face(), weight="tensor", inputs="token"),
    "fp8-static": Form(
        config=hugging_face(activation_scheme="static"), weight="tensor", inputs="static"
    ),
    "fbgemm": Form(
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1.5},
        weight="channel",
        inputs="token",
        largest=1.5,
    ),
    "modelopt": Form(config=MODELOPT, weight="tensor", inputs="static", scale_shape=()),
    "compressed-token": Form(
        config=compressed({"strategy": "channel"}, TOKEN), weight="channel", inputs="token"
    ),
    "compressed-static": Form(
        config=compressed({"strategy": "tensor"}, STATIC), weight="tensor", inputs="static"
    ),
    "compressed-blocks": Form(
        config=compressed(BLOCK_STRUCTURE, GROUP), weight="block", inputs="group"
    ),
    "compressed-weight-only": Form(
        config=compressed({"strategy": "channel"}, None), weight="channel", inputs="plain"
    ),
}
