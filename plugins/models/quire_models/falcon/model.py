"""Falcon and BLOOM. Source: Almazrouei et al., "Falcon", 2023; BigScience, "BLOOM", 2022."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.layers.rotary import RotaryTable
from quire_models.falcon import BloomConfig, FalconConfig, FusedConfig, alibi_slopes
from quire_models.plain import LayerNorm, PlainMLP


@frozen(kw_only=True)
class BlockOptions:
    """What a block has: its norms' names, and where keys' distances count, their slopes.

    `is_parallel`: attention and MLP are given the same, behind one norm or a norm each.
    """

    norm_names: tuple[str, ...]
    is_parallel: bool
    intermediate_size: int
    activation: str
    bias: bool
    slopes: tuple[float, ...] | None = None
    rotary: RotaryTable | None = None


class FusedAttention(nn.Module):
    """Project to q, k and v by one weight, whose outputs lie head group by head group."""

    def __init__(
        self,
        name: str,
        index: int,
        config: FusedConfig,
        options: BlockOptions,
        build: BuildContext,
    ) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.num_kv_heads = config.num_kv_heads
        outputs = hidden + 2 * self.num_kv_heads * self.head_dim
        self.query_key_value = build.linear(
            f"{name}.query_key_value", hidden, outputs, bias=options.bias
        )
        attention = AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            rotary=options.rotary,
            alibi_slopes=options.slopes,
        )
        self.attn = build.attention(name, attention)
        self.dense = build.linear(f"{name}.dense", hidden, hidden, bias=options.bias)

    def forward(self, x: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        qkv = self.query_key_value(x)
        if self.num_kv_heads > 1:
            # Of each group: its queries, a key, a value.
            heads = qkv.view(len(qkv), self.num_kv_heads, -1, self.head_dim)
            q, k, v = heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]
            qkv = torch.cat((q, k, v), 1).flatten(1)
        attended = self.attn(qkv, batch)
        if keep is not None:
            attended = attended.index_select(0, keep)
        out: Tensor = self.dense(attended)
        return out


class Block(nn.Module):
    """Attention and MLP, side by side or one after the other."""

    def __init__(
        self, index: int, config: FusedConfig, options: BlockOptions, build: BuildContext
    ) -> None:
        super().__init__()
        name, hidden = f"transformer.h.{index}", config.hidden_size
        self.norm_names, self.is_parallel = options.norm_names, options.is_parallel
        for norm in options.norm_names:
            self.add_module(norm, LayerNorm(hidden, config.layer_norm_epsilon, build))
        self.self_attention = FusedAttention(
            f"{name}.self_attention", index, config, options, build
        )
        self.mlp = PlainMLP(
            (f"{name}.mlp.dense_h_to_4h", f"{name}.mlp.dense_4h_to_h"),
            (hidden, options.intermediate_size),
            options.activation,
            build,
            bias=options.bias,
        )

    def forward(self, x: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        norms = [self.get_submodule(name) for name in self.norm_names]
        normed = norms[0](x)
        attended = self.self_attention(normed, batch, keep)
        if keep is not None:
            x, normed = x.index_select(0, keep), normed.index_select(0, keep)
        if not self.is_parallel:
            x = x + attended
            return x + self.mlp(norms[-1](x))
        made: Tensor = self.mlp(norms[-1](x) if len(norms) > 1 else normed)
        return made.add_(attended).add_(x)


class Stack(nn.Module):
    """Embedding, blocks and final norm: what files call transformer."""

    def __init__(self, config: FusedConfig, options: BlockOptions, build: BuildContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = build.embedding(
            "transformer.word_embeddings", config.vocab_size, hidden
        )
        layers = range(config.num_hidden_layers)
        self.h = nn.ModuleList(Block(i, config, options, build) for i in layers)
        self.ln_f = LayerNorm(hidden, config.layer_norm_epsilon, build)


class FusedForCausalLM(Model):
    """A decoder of such blocks, with a head that is mostly tied."""

    weight_names: ClassVar[WeightNames] = WeightNames(
        ignored=(r"(transformer\.)?h\.\d+\.self_attention\.(rotary_emb\.inv_freq|maybe_rotary.*)",),
        base="transformer.",
    )

    def __init__(self, config: FusedConfig, options: BlockOptions, build: BuildContext) -> None:
        super().__init__(config, build)
        self.transformer = Stack(config, options, build)
        tied = self.transformer.word_embeddings if config.tie_word_embeddings else None
        self.lm_head = build.head("lm_head", config.hidden_size, config.vocab_size, tied_to=tied)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of int32 `token_ids` [num_tokens]."""
        hidden: Tensor = self.transformer.word_embeddings(token_ids)
        return hidden

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states of the tokens that are wanted, final norm included."""
        stack, x = self.transformer, hidden
        last = len(stack.h) - 1
        for index, block in enumerate(stack.h):
            x = block(x, batch, batch.rows_to_keep() if index == last else None)
        normed: Tensor = stack.ln_f(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size] of the given hidden states."""
        logits: Tensor = self.lm_head(hidden)
        return logits


class Falcon(FusedForCausalLM):
    """Attention and MLP side by side, or, in the oldest, one after the other."""

    def __init__(self, config: FalconConfig, build: BuildContext) -> None:
        slopes, rotary = None, None
        if config.alibi:
            # Added before scores are scaled, and kept in bfloat16 when it was trained.
            narrow = torch.tensor(alibi_slopes(config.num_attention_heads)).bfloat16()
            slopes = tuple(slope * config.head_dim**-0.5 for slope in narrow.tolist())
        else:
            rotary = RotaryTable.from_parameters(
                config.rope,
                config.head_dim,
                max_len=build.max_model_len,
                dtype=build.dtype,
                device=build.device,
            )
        options = BlockOptions(
            norm_names=config.norm_names,
            is_parallel=config.parallel_attn,
            intermediate_size=config.intermediate_size,
            activation=config.activation,
            bias=config.bias,
            slopes=slopes,
            rotary=rotary,
        )
        super().__init__(config, options, build)


class Bloom(FusedForCausalLM):
    """ALiBi in every head, biases, and a norm behind the embedding."""

    def __init__(self, config: BloomConfig, build: BuildContext) -> None:
        options = BlockOptions(
            norm_names=("input_layernorm", "post_attention_layernorm"),
            is_parallel=False,
            intermediate_size=4 * config.hidden_size,
            activation="gelu_pytorch_tanh",
            bias=True,
            slopes=alibi_slopes(config.num_attention_heads),
        )
        super().__init__(config, options, build)
        norm = LayerNorm(config.hidden_size, config.layer_norm_epsilon, build)
        self.transformer.word_embeddings_layernorm = norm

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the normed embeddings of int32 `token_ids` [num_tokens]."""
        norm = self.transformer.get_submodule("word_embeddings_layernorm")
        normed: Tensor = norm(super().embed(token_ids))
        return normed
