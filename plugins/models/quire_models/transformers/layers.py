"""The layers of a class that are exchanged for Quire's, and memory for the rest of its weights."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from quire.interfaces.model import BuildContext
from quire_models.transformers.config import Refusal


class Flat(nn.Module):
    """A layer of Quire's where Transformers has one for [..., size].

    `weight` is an empty tensor: classes ask its dtype and device. What else they do with it fails.
    """

    def __init__(self, layer: nn.Module, build: BuildContext) -> None:
        super().__init__()
        self.layer = layer
        self.weight = torch.empty(0, dtype=build.dtype, device=build.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features]."""
        out: Tensor = self.layer(x.reshape(-1, x.shape[-1]))
        return out.view(*x.shape[:-1], -1)


class SharedHead(nn.Module):
    """The head of an embedding that is more than a look-up."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        # Held in a tuple, so that the embedding is not a child of the head in the module tree.
        self._embedding = (embedding,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocab_size]."""
        return nn.functional.linear(hidden, self._embedding[0].get_parameter("weight"))


class BiasedHead(Flat):
    """A head of Quire's, and a bias that files have beside its weight."""

    def __init__(self, layer: nn.Module, build: BuildContext, bias: nn.Parameter) -> None:
        super().__init__(layer, build)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., vocab_size]."""
        return super().forward(x) + self.bias


def exchange_layers(net: Any, called: set[str], is_tied: bool, build: BuildContext) -> list[str]:
    """Put Quire's layers in place of plain ones; return patterns of tensors that are not needed.

    `called` are the linear layers that the class calls; of others it takes the weight.
    """
    names = {module: name for name, module in net.named_modules()}
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    is_tied = is_tied and head is not None and head.weight is embedding.weight
    own: nn.Module | None = None
    if type(embedding) is nn.Embedding:
        own = build.embedding(names[embedding], *embedding.weight.shape)
        net.set_submodule(names[embedding], own)
    patterns = []
    if is_tied and own is None:
        net.set_submodule(names[head], SharedHead(embedding))
        patterns.append(f"{names[head]}\\.weight")
    elif type(head) is nn.Linear:
        rows, size = head.weight.shape
        made = build.head(names[head], size, rows, tied_to=own if is_tied else None)
        bias = head.bias
        flat = Flat(made, build) if bias is None else BiasedHead(made, build, bias)
        net.set_submodule(names[head], flat)
    for module, name in names.items():
        if type(module) is nn.Linear and module is not head and name in called:
            inputs, outputs = module.in_features, module.out_features
            linear = build.linear(name, inputs, outputs, bias=module.bias is not None)
            net.set_submodule(name, Flat(linear, build))
    return patterns


def fill_parameters(net: Any, build: BuildContext) -> list[str]:
    """Give the parameters that are left, and buffers, their memory on the device.

    Buffers that files hold become parameters. One that has two names is filled by the name that is
    not tied to another; returned are patterns of the names that are.
    """
    made: dict[int, nn.Parameter] = {}
    modules = {n: m for n, m in net.named_modules() if not hasattr(m, "method")}
    for module in modules.values():
        _fill_buffers(module, build)
    for name, module in modules.items():
        for own, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            full = f"{name}.{own}"
            if id(parameter) not in made:
                made[id(parameter)] = _empty(net, full, parameter, build)
            elif not _is_tied(net, full):
                raise Refusal(f"shares {full} with another weight, which it does not declare")
            module._parameters[own] = made[id(parameter)]
    return _leave_out_tied(net, modules)


def _fill_buffers(module: nn.Module, build: BuildContext) -> None:
    for own, buffer in list(module._buffers.items()):
        if buffer is None:
            continue
        if own not in module._non_persistent_buffers_set:
            del module._buffers[own]
            module.register_parameter(own, nn.Parameter(buffer, requires_grad=False))
        elif torch.device(build.device).type != "meta":
            module._buffers[own] = buffer.to(build.device)


def _is_tied(net: Any, name: str) -> bool:
    keys = getattr(net, "_tied_weights_keys", None) or {}
    return any(re.search(key, name) for key in keys)


def _leave_out_tied(net: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Take names away that stand for a parameter which has another; return their patterns."""
    counts = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    patterns = []
    for name, module in modules.items():
        for own, parameter in list(module._parameters.items()):
            full = f"{name}.{own}"
            if parameter is None or counts[id(parameter)] < 2 or not _is_tied(net, full):
                continue
            counts[id(parameter)] -= 1
            del module._parameters[own]
            # Not as a parameter: no file has it under this name.
            object.__setattr__(module, own, parameter)
            patterns.append(re.escape(full))
    return patterns


def _empty(net: Any, name: str, like: Tensor, build: BuildContext) -> nn.Parameter:
    """Return an empty parameter, in the dtype that Transformers would load it in."""
    dtype = build.dtype
    if not like.is_floating_point():
        dtype = like.dtype
    elif dtype.itemsize == 2:
        kept = set(getattr(net, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            kept |= set(getattr(net, "_keep_in_fp32_modules", None) or ())
        # As Transformers matches them: whole parts of a name, or patterns.
        if any(re.search(rf"(^|\.){one}(\.|$)", name) for one in kept):
            dtype = torch.float32
    empty = torch.empty(like.shape, dtype=dtype, device=build.device)
    return nn.Parameter(empty, requires_grad=False)


def pin_rotation(net: nn.Module, max_len: int | None) -> None:
    """Let rotations be those for sequences of `max_len` tokens, whatever a step holds.

    Transformers changes them with the longest sequence of a batch. None: leave the numbers, of a
    class on `meta`. Raises: Refusal where they differ from layer to layer.
    """
    for module in net.modules():
        kind = getattr(module, "rope_type", None)
        changes = [k for k in (kind.values() if isinstance(kind, dict) else [kind]) if _moves(k)]
        if not changes:
            continue
        if isinstance(kind, dict):
            raise Refusal(
                f"has rope_parameters of type {changes[0]!r} that differ from layer to layer."
            )
        if max_len is not None:
            module(torch.empty(1), torch.tensor([[max_len - 1]]))
        module.rope_type = "default"  # type: ignore[assignment]


def _moves(kind: Any) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
