"""Scales of a compressed-tensors checkpoint, in any float, as `quire_quant.packed` keeps them.

Shared by the methods of this package; not a plugin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import WeightLayer
from quire_quant.packed import PackedForm, tensor_name

# Of a scale's eight bits in bfloat16 none may be lost in float16.
LARGEST_ERROR = 2.0**-8


def narrow_scales(layer: WeightLayer, form: PackedForm) -> Tensor:
    """Return `weight_scale` float32 [out_features, num_groups] as float16 [groups, out_features].

    Raises: CheckpointError naming the tensor with a scale that is NaN or that float16 cannot hold.
    """
    wide = layer.get_weight("weight_scale").data
    narrow = wide.to(torch.float16)
    wrong = ~((narrow.float() - wide).abs() <= LARGEST_ERROR * wide.abs())
    if not bool(wrong.any()):
        return narrow.T.contiguous()
    output, group = wrong.nonzero()[0].tolist()
    found, part = wide[output, group].item(), 0
    while output >= form.part_sizes[part]:
        output -= form.part_sizes[part]
        part += 1
    raise CheckpointError(
        f"tensor {tensor_name(layer.spec, part, 'weight_scale')!r} has the scale {found:g} at "
        f"group {group} of output {output}, which float16 cannot hold. The file is damaged; "
        "download it again."
    )
