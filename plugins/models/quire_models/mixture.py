"""A mixture of experts: a router, the experts that it chooses, one that serves every token."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional

from quire.interfaces.model import BuildContext
from quire_kernels import ops
from quire_models.norm import Norm, after_silu_mul

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@frozen(kw_only=True)
class MixtureOptions:
    """What tells one family's mixture from another's.

    `size` is an expert's, `shared_size` that of the expert which serves every token; None: there is
    none. `normalised`: the weights of a token's experts sum to one. `name` is the module's in its
    layer, `parts` the names of an expert's gate, up and down projections. `groups`: experts are
    chosen as it says; the expert that serves every token then has no gate, and with `shared_bias`
    biases.
    """

    num_experts: int
    top_k: int
    size: int
    normalised: bool
    shared_size: int | None = None
    name: str = "mlp"
    parts: tuple[str, str, str] = GATE_UP_DOWN
    groups: ops.GroupChoice | None = None
    shared_bias: bool = False


class SharedExpert(nn.Module):
    """An MLP that serves every token, as much as its own gate says where it has one."""

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int],
        build: BuildContext,
        *,
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        hidden, size = sizes
        self.gate_up_proj = build.linear(
            f"{name}.gate_up_proj", hidden, (size, size), bias=bias, parts=GATE_UP_DOWN[:2]
        )
        self.down_proj = build.linear(f"{name}.down_proj", size, hidden, bias=bias)
        self.gate = build.linear(f"{name}_gate", hidden, 1) if gated else None
        self.batch_invariant = build.batch_invariant

    def forward(self, x: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        gate_up = self.gate_up_proj(x)
        made = after_silu_mul(self.down_proj, gate_up, batch_invariant=self.batch_invariant)
        if self.gate is None:
            return made
        gate: Tensor = self.gate(x)
        return made * gate.sigmoid()


class GroupRouter(nn.Module):
    """Choose experts of the best groups; scores are made in float32 or wider."""

    def __init__(
        self, hidden: int, options: MixtureOptions, groups: ops.GroupChoice, build: BuildContext
    ) -> None:
        super().__init__()
        self.top_k, self.groups = options.top_k, groups
        self.weight = _wide(options.num_experts, hidden, build=build)
        self.e_score_correction_bias: nn.Parameter | None = None
        if self.groups.scoring == "sigmoid":
            self.e_score_correction_bias = _wide(options.num_experts, build=build)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and ids of each token's experts, [num_tokens, top_k] each."""
        logits = functional.linear(x.to(self.weight.dtype), self.weight)
        return ops.route_in_groups(logits, self.top_k, self.groups, self.e_score_correction_bias)


def _wide(*shape: int, build: BuildContext) -> nn.Parameter:
    """Return an empty parameter in float32, or in what the model has that is wider."""
    dtype = torch.promote_types(build.dtype, torch.float32)
    empty = torch.empty(shape, dtype=dtype, device=build.device)
    return nn.Parameter(empty, requires_grad=False)


class Mixture(nn.Module):
    """Choose experts for each token and sum what they make."""

    def __init__(
        self, layer: str, hidden: int, options: MixtureOptions, build: BuildContext
    ) -> None:
        super().__init__()
        name, num_experts = f"{layer}.{options.name}", options.num_experts
        self.options = options
        self.gate: nn.Module
        if options.groups is None:
            self.gate = build.linear(f"{name}.gate", hidden, num_experts)
        else:
            self.gate = GroupRouter(hidden, options, options.groups, build)
        self.experts = build.experts(
            f"{name}.experts",
            num_experts,
            hidden,
            options.size,
            top_k=options.top_k,
            parts=options.parts,
        )
        self.shared_expert: SharedExpert | None = None
        if options.shared_size is not None:
            sizes, groups = (hidden, options.shared_size), options.groups
            if groups is None:
                self.shared_expert = SharedExpert(f"{name}.shared_expert", sizes, build)
            else:
                shared = f"{name}.shared_experts"
                bias = options.shared_bias
                self.shared_expert = SharedExpert(shared, sizes, build, gated=False, bias=bias)

    def forward(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return what is made of the normalised sum, [num_tokens, hidden_size], and the sum."""
        normed, total = norm.add(x, residual)
        weights, expert_ids = self._routed(normed)
        out: Tensor = self.experts(normed, weights, expert_ids)
        if self.shared_expert is not None:
            out = out + self.shared_expert(normed)
        return out, total

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.options.groups is not None:
            routed: tuple[Tensor, Tensor] = self.gate(x)
            return routed
        return ops.route(self.gate(x), self.options.top_k, normalise=self.options.normalised)
