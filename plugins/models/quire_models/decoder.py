"""What Llama-like families share: the decoder layer, its parts and the whole model."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar

from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.layers.rotary import RotaryTable
from quire_models.decoder_config import DecoderConfig
from quire_models.latent import LatentSelfAttention, LatentSizes
from quire_models.mixture import Mixture, MixtureOptions
from quire_models.norm import Norm, after_silu_mul


@frozen(kw_only=True)
class LayerOptions:
    """What tells one family's layer from another's; `qk_norm` is the norm's eps.

    With `mixture` the layer has experts instead of one MLP, with `latent` latent attention, with
    `sinks` one in each head. `rotary_table` is of all layers. `make_mlp` makes what stands for the
    MLP, of the layer's name, the hidden size and the builder.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: float | None = None
    sliding_window: int | None = None
    mixture: MixtureOptions | None = None
    latent: LatentSizes | None = None
    sinks: bool = False
    rotary_table: type[RotaryTable] = RotaryTable
    make_mlp: Callable[[str, int, BuildContext], nn.Module] | None = None


class SelfAttention(nn.Module):
    """Project to q, k and v at once, attend, project back."""

    def __init__(
        self,
        name: str,
        index: int,
        config: DecoderConfig,
        options: LayerOptions,
        rotary: RotaryTable,
        build: BuildContext,
    ) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * head_dim, config.num_kv_heads * head_dim
        self.qkv_proj = build.linear(
            f"{name}.qkv_proj",
            hidden,
            (q_size, kv_size, kv_size),
            bias=options.qkv_bias,
            parts=("q_proj", "k_proj", "v_proj"),
        )
        attention = AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rotary=rotary,
            qk_norm=options.qk_norm,
            sliding_window=options.sliding_window,
            sinks=options.sinks,
        )
        self.attn = build.attention(name, attention)
        self.o_proj = build.linear(f"{name}.o_proj", q_size, hidden, bias=options.output_bias)

    def forward(self, qkv: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        attended = self.attn(qkv, batch)
        if keep is not None:
            attended = attended.index_select(0, keep)
        out: Tensor = self.o_proj(attended)
        return out


class MLP(nn.Module):
    """Gate, multiply and project back."""

    def __init__(self, name: str, config: DecoderConfig, bias: bool, build: BuildContext) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = build.linear(
            f"{name}.gate_up_proj", hidden, (size, size), bias=bias, parts=("gate_proj", "up_proj")
        )
        self.down_proj = build.linear(f"{name}.down_proj", size, hidden, bias=bias)

    def forward(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return what is made of the normalised sum, [num_tokens, hidden_size], and the sum."""
        fused = norm.add_then_gated(self.gate_up_proj, x, residual)
        if fused is not None:
            gated, total = fused
            out: Tensor = self.down_proj(gated)
        else:
            gate_up, total = norm.add_then(self.gate_up_proj, x, residual)
            out = after_silu_mul(self.down_proj, gate_up, batch_invariant=norm.batch_invariant)
        return out, total


def _attention(
    name: str,
    index: int,
    config: DecoderConfig,
    options: LayerOptions,
    rotary: RotaryTable,
    build: BuildContext,
) -> SelfAttention | LatentSelfAttention:
    if options.latent is None:
        return SelfAttention(name, index, config, options, rotary, build)
    return LatentSelfAttention(name, index, options.latent, rotary, build)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        index: int,
        config: DecoderConfig,
        options: LayerOptions,
        rotary: RotaryTable,
        build: BuildContext,
    ) -> None:
        super().__init__()
        name, eps = f"model.layers.{index}", config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size, eps, build)
        self.self_attn = _attention(f"{name}.self_attn", index, config, options, rotary, build)
        self.post_attention_layernorm = Norm(config.hidden_size, eps, build)
        self.mlp: nn.Module
        if options.make_mlp is not None:
            self.mlp = options.make_mlp(name, config.hidden_size, build)
        elif options.mixture is None:
            self.mlp = MLP(f"{name}.mlp", config, options.mlp_bias, build)
        else:
            self.mlp = Mixture(name, config.hidden_size, options.mixture, build)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds and the residual to add it to.

        The addition is left to the next norm, so that both are one operation. With `keep`, rows
        of tokens, both are made for these alone.
        """
        project = self.self_attn.qkv_proj
        if residual is None:
            qkv, residual = project(self.input_layernorm(x)), x
        else:
            qkv, residual = self.input_layernorm.add_then(project, x, residual)
        attended = self.self_attn(qkv, batch, keep)
        if keep is not None:
            residual = residual.index_select(0, keep)
        added: tuple[Tensor, Tensor]
        added = self.mlp(attended, residual, self.post_attention_layernorm)
        return added


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model`."""

    def __init__(
        self, config: DecoderConfig, options: list[LayerOptions], build: BuildContext
    ) -> None:
        super().__init__()
        self.embed_tokens = build.embedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size
        )
        rotary = options[0].rotary_table.from_parameters(
            config.rope,
            config.head_dim,
            max_len=build.max_model_len,
            dtype=build.dtype,
            device=build.device,
        )
        self.layers = nn.ModuleList(
            DecoderLayer(index, config, layer, rotary, build) for index, layer in enumerate(options)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, build)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states, final norm included, of the tokens that are wanted.

        The last layer's values are read by nobody but the head, so its projections and MLP are
        computed for the rows that get logits: of a prompt, one.
        """
        x: Tensor = hidden
        residual: Tensor | None = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, batch, batch.rows_to_keep() if index == last else None)
        assert residual is not None, "a model has at least one layer"
        normed: Tensor = self.norm.add(x, residual)[0]
        return normed


class DecoderForCausalLM(Model):
    """A Llama-like model; a family says only how its layers differ."""

    batch_invariant: ClassVar[bool] = True
    weight_names: ClassVar[WeightNames] = WeightNames(
        # The attention layer holds the weights of the q and k norms, one level deeper than files.
        renamed={r"\.self_attn\.attn\.": ".self_attn."},
        ignored=(r".*\.rotary_emb\.inv_freq",),
    )

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        options = [self.layer_options(config, i) for i in range(config.num_hidden_layers)]
        self.model = DecoderStack(config, options, build)
        self.lm_head = build.head(
            "lm_head",
            config.hidden_size,
            config.vocab_size,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
        )

    @staticmethod
    @abc.abstractmethod
    def layer_options(config: DecoderConfig, index: int) -> LayerOptions:
        """Return what the family's layer of this index has."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of int32 `token_ids` [num_tokens]."""
        hidden: Tensor = self.model.embed_tokens(token_ids)
        return hidden

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states of the tokens that are wanted, final norm included."""
        last: Tensor = self.model(hidden, batch)
        return last

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size] of the given hidden states."""
        logits: Tensor = self.lm_head(hidden)
        return logits
