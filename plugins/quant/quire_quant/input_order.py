"""Groups of inputs that do not lie together: check their indices, and sort codes by them.

Shared by the methods of this package that read `g_idx`; not a plugin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import EmbeddingSpec, LinearSpec
from quire_quant.packed import PackedForm, pack, tensor_name, unpack


def input_order(
    indices: Tensor, form: PackedForm, spec: LinearSpec | EmbeddingSpec, name: str
) -> Tensor | None:
    """Return int32 [1 or parts, in_features]: inputs sorted by group; None: they are.

    `indices` int32 [parts * in_features] names each input's group, projection after projection;
    `name` is what the checkpoint calls a projection's tensor of them.
    Raises: CheckpointError naming the tensor with groups out of range or of another size.
    """
    orders = []
    for part, own in enumerate(indices.split(form.in_features)):
        _check_groups(own, form, tensor_name(spec, part, name))
        orders.append(own.argsort(stable=True).to(torch.int32))
    if all(torch.equal(order, orders[0]) for order in orders[1:]):
        del orders[1:]
    plain = torch.arange(form.in_features, dtype=torch.int32, device=indices.device)
    is_sorted = all(torch.equal(order, plain) for order in orders)
    return None if is_sorted else torch.stack(orders)


def plain_indices(form: PackedForm, device: torch.device) -> Tensor:
    """Return the indices of inputs in their order, one projection's after another."""
    inputs = torch.arange(form.in_features, dtype=torch.int32, device=device)
    return (inputs // form.group_size).repeat(len(form.part_sizes))


def reorder(values: Tensor, span: slice, order: Tensor, form: PackedForm) -> None:
    """Sort the codes of some outputs of `values` in place, a slice at a time."""
    for outputs in form.pieces(span.start, span.stop):
        codes = unpack(values[outputs], form.bits, form.in_features)
        values[outputs] = pack(codes[:, order], form.bits)


def _check_groups(indices: Tensor, form: PackedForm, name: str) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= form.num_groups:
        wrong = low if low < 0 else high
        raise CheckpointError(
            f"tensor {name!r} names group {wrong}; {form.in_features} inputs in groups of "
            f"{form.group_size} have groups 0 to {form.num_groups - 1}. Compare group_size in "
            f"config.json with the checkpoint's, or download it again."
        )
    sizes = torch.bincount(indices, minlength=form.num_groups)
    if bool((sizes != form.group_size).any()):
        group = int((sizes != form.group_size).nonzero()[0])
        raise CheckpointError(
            f"tensor {name!r} puts {int(sizes[group])} inputs into group {group}; config.json "
            f"says group_size {form.group_size}. Compare it with the checkpoint's, or download "
            f"it again."
        )
