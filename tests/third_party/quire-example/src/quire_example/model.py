"""ExampleForCausalLM: attention and MLP read the same norm and are added behind learned gates."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model
from quire.layers.rotary import RotaryTable
from quire_example.config import ExampleConfig
from quire_kernels import ops


class ExampleLayer(nn.Module):
    """x + attention_gate * attention(norm(x)) + mlp_gate * mlp(norm(x)), a gate a channel.

    Its tensors are called `layers.N.q_proj.weight`, `layers.N.mlp_gate` and so on: the names that
    `build` gets, and the names of this module's own parameters.
    """

    def __init__(
        self, index: int, config: ExampleConfig, rotary: RotaryTable, build: BuildContext
    ) -> None:
        super().__init__()
        name, hidden = f"layers.{index}", config.hidden_size
        kv_size = config.num_kv_heads * config.head_dim
        self.eps = config.rms_norm_eps
        self.norm = build.parameter(hidden)
        self.attention_gate = build.parameter(hidden)
        self.mlp_gate = build.parameter(hidden)
        self.qkv_proj = build.linear(
            f"{name}.qkv_proj",
            hidden,
            (hidden, kv_size, kv_size),
            parts=("q_proj", "k_proj", "v_proj"),
        )
        self.attention = build.attention(
            f"{name}.attention",
            AttentionOptions(
                layer_index=index,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.head_dim**-0.5,
                rotary=rotary,
            ),
        )
        self.o_proj = build.linear(f"{name}.o_proj", hidden, hidden)
        self.up_proj = build.linear(f"{name}.up_proj", hidden, config.intermediate_size)
        self.down_proj = build.linear(f"{name}.down_proj", config.intermediate_size, hidden)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        normed = ops.rms_norm(x, self.norm, self.eps)
        attended = self.o_proj(self.attention(self.qkv_proj(normed), batch))
        squared = functional.relu(self.up_proj(normed)).square()
        return x + self.attention_gate * attended + self.mlp_gate * self.down_proj(squared)


class ExampleForCausalLM(Model):
    """The whole model; `embed`, `forward` and `logits` are what Quire calls."""

    def __init__(self, config: ExampleConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        rotary = RotaryTable.from_parameters(
            config.rope,
            config.head_dim,
            max_len=build.max_model_len,
            dtype=build.dtype,
            device=build.device,
        )
        self.eps = config.rms_norm_eps
        self.embedding = build.embedding("embedding", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ExampleLayer(index, config, rotary, build) for index in range(config.num_hidden_layers)
        )
        self.norm = build.parameter(config.hidden_size)
        self.head = build.head(
            "head",
            config.hidden_size,
            config.vocab_size,
            tied_to=self.embedding if config.tie_word_embeddings else None,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        return self.embedding(token_ids)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, hidden_size], normalised for the head."""
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return ops.rms_norm(hidden, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [num_rows, vocab_size]."""
        return self.head(hidden)
