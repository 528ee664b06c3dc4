"""A mixture of experts: a router, the experts that it chooses, one that serves every token."""

from __future__ import annotations

from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.model import BuildContext
from quire_kernels import ops
from quire_models.norm import Norm, after_silu_mul

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@frozen(kw_only=True)
class MixtureOptions:
    """What tells one family's mixture from another's.

    `size` is an expert's, `shared_size` that of the expert which serves every token; None: there is
    none. `normalised`: the weights of a token's experts sum to one. `name` is the module's in its
    layer, `parts` the names of an expert's gate, up and down projections.
    """

    num_experts: int
    top_k: int
    size: int
    normalised: bool
    shared_size: int | None = None
    name: str = "mlp"
    parts: tuple[str, str, str] = GATE_UP_DOWN


class SharedExpert(nn.Module):
    """An MLP that serves every token, as much as its own gate says."""

    def __init__(self, name: str, hidden: int, size: int, build: BuildContext) -> None:
        super().__init__()
        self.gate_up_proj = build.linear(
            f"{name}.gate_up_proj", hidden, (size, size), parts=GATE_UP_DOWN[:2]
        )
        self.down_proj = build.linear(f"{name}.down_proj", size, hidden)
        self.gate = build.linear(f"{name}_gate", hidden, 1)
        self.batch_invariant = build.batch_invariant

    def forward(self, x: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        gate_up = self.gate_up_proj(x)
        made = after_silu_mul(self.down_proj, gate_up, batch_invariant=self.batch_invariant)
        gate: Tensor = self.gate(x)
        return made * gate.sigmoid()


class Mixture(nn.Module):
    """Choose experts for each token and sum what they make."""

    def __init__(
        self, layer: str, hidden: int, options: MixtureOptions, build: BuildContext
    ) -> None:
        super().__init__()
        name, num_experts = f"{layer}.{options.name}", options.num_experts
        self.options = options
        self.gate = build.linear(f"{name}.gate", hidden, num_experts)
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
            self.shared_expert = SharedExpert(
                f"{name}.shared_expert", hidden, options.shared_size, build
            )

    def forward(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return what is made of the normalised sum, [num_tokens, hidden_size], and the sum."""
        normed, total = norm.add(x, residual)
        weights, expert_ids = ops.route(
            self.gate(normed), self.options.top_k, normalise=self.options.normalised
        )
        out: Tensor = self.experts(normed, weights, expert_ids)
        if self.shared_expert is not None:
            out = out + self.shared_expert(normed)
        return out, total
