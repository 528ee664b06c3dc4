"""The stages of a model that gives vectors or scores instead of logits."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from quire.interfaces.batch import Batch
from quire.testing.bound import same_bits
from quire.testing.kit_report import Failure
from quire.testing.model_cases import ModelCase
from quire.testing.model_run import Ready


def check_pooling_stages(case: ModelCase, found: Ready, batch: Batch) -> Failure | None:
    """Shapes, dtypes, nothing changed, and the same bits again."""
    model, dtype = found.model, getattr(torch, case.dtype)
    num_tokens, size = len(batch.token_ids), model.config.hidden_size
    kept = {name: tensor.clone() for name, tensor in fields_of(batch).items()}
    with torch.inference_mode():
        hidden = model.embed(batch.token_ids)
        last = model(hidden.clone(), batch)
        out = found.outputs(last, batch)
    whole = [num_tokens, size]
    shapes = {"embed": (hidden, whole), "forward": (last, whole)}
    if found.gives == "scores":
        shapes["scores"] = (out, [len(case.lengths), model.config.num_labels])
    for name, (tensor, shape) in shapes.items():
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            return Failure(what=f"{name} gives {got} instead of {dtype} {shape}", case=case)
    changed = [
        name for name, tensor in fields_of(batch).items() if not same_bits(kept[name], tensor)
    ]
    if changed:
        return Failure(what=f"batch.{changed[0]} was changed; nobody may", case=case)
    if not same_bits(found.forward(batch), found.forward(batch)):
        return Failure(what="the same step twice gives other bits", case=case)
    return None


def fields_of(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by their fields."""
    given = {field.name: getattr(batch, field.name) for field in attrs.fields(Batch)}
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}
