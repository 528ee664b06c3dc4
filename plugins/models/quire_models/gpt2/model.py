"""GPT-2. Source: Radford et al., "Language models are unsupervised multitask learners", 2019."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire_models.gpt2 import GPT2Config
from quire_models.plain import LayerNorm, PlainMLP


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, index: int, config: GPT2Config, build: BuildContext) -> None:
        super().__init__()
        name, hidden, eps = f"transformer.h.{index}", config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(hidden, eps, build)
        self.c_attn = build.linear(f"{name}.attn.c_attn", hidden, 3 * hidden, bias=True)
        attention = AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            scale=config.scale(index),
        )
        self.attn = build.attention(f"{name}.attn", attention)
        self.c_proj = build.linear(f"{name}.attn.c_proj", hidden, hidden, bias=True)
        self.ln_2 = LayerNorm(hidden, eps, build)
        self.mlp = PlainMLP(
            (f"{name}.mlp.c_fc", f"{name}.mlp.c_proj"),
            (hidden, config.intermediate_size),
            config.activation_function,
            build,
        )

    def forward(self, x: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        attended = self.attn(self.c_attn(self.ln_1(x)), batch)
        if keep is not None:
            attended, x = attended.index_select(0, keep), x.index_select(0, keep)
        x = x + self.c_proj(attended)
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Embeddings of tokens and of positions, blocks and final norm: what files call transformer."""

    def __init__(self, config: GPT2Config, build: BuildContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.wte = build.embedding("transformer.wte", config.vocab_size, hidden)
        self.wpe = build.embedding("transformer.wpe", config.max_position_embeddings, hidden)
        self.h = nn.ModuleList(Block(i, config, build) for i in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(hidden, config.layer_norm_epsilon, build)


class GPT2(Model):
    """A decoder with learned positions; files hold its linear weights as [inputs, outputs]."""

    weight_names: ClassVar[WeightNames] = WeightNames(
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        transposed=(r".*\.c_(attn|proj|fc)\.weight",),
        base="transformer.",
    )

    def __init__(self, config: GPT2Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.transformer = Stack(config, build)
        tied = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = build.head("lm_head", config.hidden_size, config.vocab_size, tied_to=tied)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of int32 `token_ids` [num_tokens], without their positions'."""
        hidden: Tensor = self.transformer.wte(token_ids)
        return hidden

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states of the tokens that are wanted, final norm included."""
        stack = self.transformer
        x: Tensor = hidden + stack.wpe(batch.positions)
        last = len(stack.h) - 1
        for index, block in enumerate(stack.h):
            x = block(x, batch, batch.rows_to_keep() if index == last else None)
        normed: Tensor = stack.ln_f(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size] of the given hidden states."""
        logits: Tensor = self.lm_head(hidden)
        return logits
