"""Read AWQ's GEMM layout. Source: Lin et al., "AWQ", 2023; the files are AutoAWQ's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    ShardRule,
    WeightLayer,
)
from quire_quant.config_values import (
    flag_of,
    group_size_of,
    multiple_needed,
    names_of,
    one_of,
    refuse,
    value_of,
)
from quire_quant.module_names import part_names
from quire_quant.packed import (
    PackedForm,
    PackedProduct,
    as_bytes,
    check_scales,
    pack,
    settle_scales,
    unpack,
)
from quire_quant.packed_experts import experts_method, why_not_experts
from quire_quant.plain_modules import PackedMethod
from quire_quant.rounding import quantize

BITS = 4
WORD = 8  # codes in an int32
# Code i of a word, from the lowest bits on, belongs to output ORDER[i] of the word's eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACE = tuple(ORDER.index(output) for output in range(WORD))


def _codes(words: Tensor) -> Tensor:
    """Return uint8 [n, outputs] of int32 [n, outputs / 8], outputs in their order."""
    packed = as_bytes(words)
    codes = unpack(packed, BITS, packed.shape[1] * 2)
    return codes.unflatten(1, (-1, WORD))[..., PLACE].flatten(1)


def to_words(codes: Tensor) -> Tensor:
    """Return the int32 [n, outputs / 8] of codes uint8 [n, outputs]."""
    return pack(codes.unflatten(1, (-1, WORD))[..., ORDER].flatten(1), BITS).view(torch.int32)


class AwqProduct(PackedProduct):
    """Eight outputs an int32; repacked so that the inputs of an output lie together."""

    def create_weights(self, layer: WeightLayer) -> None:
        """Register the checkpoint's tensors, without memory until they are filled."""
        form = self.form
        words, device = form.out_features // WORD, "meta"
        qweight = torch.empty(form.in_features, words, dtype=torch.int32, device=device)
        rule = ShardRule(output_dim=1, input_dim=0, packed_dim=1, pack_factor=WORD)
        layer.add_weight("qweight", qweight, rule)
        qzeros = torch.empty(form.num_groups, words, dtype=torch.int32, device=device)
        rule = ShardRule(
            output_dim=1, input_dim=0, packed_dim=1, pack_factor=WORD, group_size=form.group_size
        )
        layer.add_weight("qzeros", qzeros, rule)
        shape = (form.num_groups, form.out_features)
        scales = torch.empty(shape, dtype=torch.float16, device=device)
        rule = ShardRule(output_dim=1, input_dim=0, group_size=form.group_size)
        layer.add_weight("scales", scales, rule)

    def finish_loading(self, layer: WeightLayer) -> None:
        """Repack a slice of outputs at a time."""
        form = self.form
        qweight, scales = layer.get_weight("qweight").data, layer.get_weight("scales").data
        check_scales(layer, scales, form, "scales")
        values = qweight.new_empty(form.out_features, form.in_features // 2, dtype=torch.uint8)
        for outputs in form.pieces():
            words = slice(outputs.start // WORD, outputs.stop // WORD)
            values[outputs] = pack(_codes(qweight[:, words]).T, BITS)
        zeros = pack(_codes(layer.get_weight("qzeros").data), BITS)
        for name in ("qweight", "qzeros", "scales"):
            layer.drop_weight(name)
        self.install(layer, values=values, scales=scales, zeros=zeros)

    def settle_drawn(self, layer: WeightLayer) -> None:
        """Make the weights as large as others."""
        settle_scales(layer.get_weight("scales").data, BITS)


class Awq(PackedMethod):
    """Serve linears but those of `modules_to_not_convert`; embeddings and heads stay as they are.

    A layer is left alone where one of those names is part of its own, or where the file has it in
    full precision; not where the file has it packed.
    """

    example_config: ClassVar[Mapping[str, Any]] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        one_of(config, ("bits", "w_bit"), (BITS,))
        self.group_size = group_size_of(config, ("group_size", "q_group_size"))
        if not flag_of(config, "zero_point", True):
            raise refuse("zero_point", False, "true")
        # GPTQModel says `format`; one of them may be given without the other.
        for key in ("version", "format", "checkpoint_format"):
            layout = value_of(config, (key,), "gemm")
            if not isinstance(layout, str) or layout.lower() != "gemm":
                raise refuse(key, layout, "'gemm'")
        if config.get("backend") == "llm-awq":
            raise refuse("backend", "llm-awq", "what AutoAWQ writes, which lies otherwise")
        self.excluded = names_of(config, "modules_to_not_convert")

    def _is_excluded(self, name: str, spec: LinearSpec) -> bool:
        if f"{name}.qweight" in self.stored:
            # "gate", for a router, is part of the name of a gate projection too.
            return False
        return self.is_left_alone(name, spec) or any(excluded in name for excluded in self.excluded)

    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Serve linears whose inputs make whole groups and whose outputs make whole words."""
        if isinstance(spec, ExpertsSpec):
            return why_not_experts(self, spec)
        if isinstance(spec, EmbeddingSpec):
            return None
        if not isinstance(spec, LinearSpec):
            return f"it has no method for {type(spec).__name__}"
        left = [name for name in part_names(spec) if self._is_excluded(name, spec)]
        if left:
            if len(left) == len(spec.parts):
                return None
            return f"modules_to_not_convert leaves {left[0]} alone, but not what it is fused with"
        unit = self.group_size or 8
        reasons = [multiple_needed("its inputs", spec.in_features, unit)]
        for name, size in zip(part_names(spec), spec.output_sizes, strict=True):
            reasons.append(multiple_needed(f"the outputs of {name}", size, WORD))
        return next((reason for reason in reasons if reason), None)

    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return the product of experts, or of a linear that is not excluded."""
        if isinstance(spec, ExpertsSpec):
            return experts_method(self, spec)
        if not isinstance(spec, LinearSpec) or self._is_excluded(part_names(spec)[0], spec):
            return None
        return AwqProduct(PackedForm.of(spec, BITS, self.group_size))

    @classmethod
    def encode(cls, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return a weight in the form of `example_config`, rounded to nearest."""
        codes, scales, zeros = quantize(weight, BITS, cls.example_config["group_size"])
        groups = codes.double().unflatten(1, (scales.shape[1], -1))
        exact = (groups - zeros.double()[..., None]) * scales.double()[..., None]
        tensors = {
            "qweight": to_words(codes.T),
            "qzeros": to_words(zeros.T),
            "scales": scales.T.contiguous(),
        }
        return EncodedWeight(tensors=tensors, weight=exact.flatten(1))
