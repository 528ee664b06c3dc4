"""What Llama-like families share: the decoder layer, its parts and the whole model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.interfaces.rope import RopeParameters
from quire.layers.rotary import RotaryTable
from quire_kernels import ops
from quire_models.decoder_config import DecoderConfig
from quire_models.latent import LatentSelfAttention, LatentSizes
from quire_models.mixture import Mixture, MixtureOptions
from quire_models.norm import NoNorm, Norm, after_silu_mul


@frozen(kw_only=True)
class LayerOptions:
    """What tells one family's layer from another's; `qk_norm` is the norm's eps.

    With `mixture` the layer has experts instead of one MLP, with `latent` latent attention, with
    `sinks` one in each head. `is_fused`: files hold q, k and v as one tensor, and gate and up as
    one. `norms_qk`: q and k go through a `norm` before attention, "head" by head or "whole".
    `scale` and `rope` where they are not what the config's sizes say. `make_mlp` makes what stands
    for the MLP, of the layer's name, the hidden size and the builder.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    is_fused: bool = False
    qk_norm: float | None = None
    norms_qk: Literal["head", "whole"] | None = None
    scale: float | None = None
    logit_softcap: float | None = None
    rope: RopeParameters | None = None
    sliding_window: int | None = None
    is_gelu: bool = False
    mixture: MixtureOptions | None = None
    norm: type[Norm] = Norm
    latent: LatentSizes | None = None
    sinks: bool = False
    rotary_table: type[RotaryTable] = RotaryTable
    make_mlp: Callable[[str, int, BuildContext], nn.Module] | None = None


def projections(
    name: str,
    in_features: int,
    parts: Mapping[str, int],
    bias: bool,
    is_fused: bool,
    build: BuildContext,
) -> nn.Module:
    """Make one layer of projections, which files hold apart or, `is_fused`, as one."""
    if is_fused:
        return build.linear(name, in_features, sum(parts.values()), bias=bias)
    return build.linear(name, in_features, tuple(parts.values()), bias=bias, parts=tuple(parts))


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
        self.qkv_proj = projections(
            f"{name}.qkv_proj",
            hidden,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            options.qkv_bias,
            options.is_fused,
            build,
        )
        self.sizes = (q_size, kv_size, kv_size)
        self.normed_sizes: tuple[int, int] | None = None
        if options.norms_qk is not None:
            is_whole = options.norms_qk == "whole"
            self.normed_sizes = (q_size, kv_size) if is_whole else (head_dim, head_dim)
            self.q_norm = options.norm(self.normed_sizes[0], config.rms_norm_eps, build)
            self.k_norm = options.norm(self.normed_sizes[1], config.rms_norm_eps, build)
        attention = AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            scale=options.scale or head_dim**-0.5,
            rotary=rotary,
            qk_norm=options.qk_norm,
            sliding_window=options.sliding_window,
            logit_softcap=options.logit_softcap,
            sinks=options.sinks,
        )
        self.attn = build.attention(name, attention)
        self.o_proj = build.linear(f"{name}.o_proj", q_size, hidden, bias=options.output_bias)

    def forward(self, qkv: Tensor, batch: Batch, keep: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size], or the rows in `keep` of it."""
        if self.normed_sizes is not None:
            q, k, v = qkv.split(self.sizes, -1)
            q = self.q_norm(q.unflatten(-1, (-1, self.normed_sizes[0]))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.normed_sizes[1]))).flatten(-2)
            qkv = torch.cat((q, k, v), -1)
        attended = self.attn(qkv, batch)
        if keep is not None:
            attended = attended.index_select(0, keep)
        out: Tensor = self.o_proj(attended)
        return out


class MLP(nn.Module):
    """Gate, multiply and project back."""

    def __init__(
        self, name: str, config: DecoderConfig, options: LayerOptions, build: BuildContext
    ) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.intermediate_size, options.mlp_bias
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = projections(
            f"{name}.gate_up_proj", hidden, parts, bias, options.is_fused, build
        )
        self.down_proj = build.linear(f"{name}.down_proj", size, hidden, bias=bias)
        self.is_gelu = options.is_gelu

    def forward(self, x: Tensor, residual: Tensor, norm: Norm | NoNorm) -> tuple[Tensor, Tensor]:
        """Return what is made of the normalised sum, [num_tokens, hidden_size], and the sum."""
        if self.is_gelu:
            gate_up, total = norm.add_then(self.gate_up_proj, x, residual)
            gated = ops.gelu_mul(gate_up, batch_invariant=norm.batch_invariant)
            return self.down_proj(gated), total
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
        self.input_layernorm = options.norm(config.hidden_size, eps, build)
        self.self_attn = _attention(f"{name}.self_attn", index, config, options, rotary, build)
        self.post_attention_layernorm = options.norm(config.hidden_size, eps, build)
        self.mlp: nn.Module
        if options.make_mlp is not None:
            self.mlp = options.make_mlp(name, config.hidden_size, build)
        elif options.mixture is None:
            self.mlp = MLP(f"{name}.mlp", config, options, build)
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


class NormsAfterLayer(nn.Module):
    """Attention and MLP, each with a norm behind it and, by `norms_before`, one before it."""

    norms_before: ClassVar[bool] = True

    def __init__(
        self,
        index: int,
        config: DecoderConfig,
        options: LayerOptions,
        rotary: RotaryTable,
        build: BuildContext,
    ) -> None:
        super().__init__()
        name, size, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        has_norm = self.norms_before
        self.input_layernorm = options.norm(size, eps, build) if has_norm else NoNorm(build)
        self.self_attn = SelfAttention(f"{name}.self_attn", index, config, options, rotary, build)
        self.post_attention_layernorm = options.norm(size, eps, build)
        self.pre_feedforward_layernorm = (
            options.norm(size, eps, build) if has_norm else NoNorm(build)
        )
        self.mlp = MLP(f"{name}.mlp", config, options, build)
        self.post_feedforward_layernorm = options.norm(size, eps, build)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `DecoderLayer.forward` does."""
        project = self.self_attn.qkv_proj
        if residual is None:
            qkv, residual = project(self.input_layernorm(x)), x
        else:
            qkv, residual = self.input_layernorm.add_then(project, x, residual)
        attended = self.post_attention_layernorm(self.self_attn(qkv, batch, keep))
        if keep is not None:
            residual = residual.index_select(0, keep)
        made, total = self.mlp(attended, residual, self.pre_feedforward_layernorm)
        return self.post_feedforward_layernorm(made), total


class NormsOnlyAfterLayer(NormsAfterLayer):
    """Attention and MLP see the residual stream as it is."""

    norms_before = False


class DecoderStack(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model`."""

    def __init__(
        self,
        config: DecoderConfig,
        options: list[LayerOptions],
        layer_class: type[DecoderLayer | NormsAfterLayer],
        build: BuildContext,
    ) -> None:
        super().__init__()
        self.embed_tokens = build.embedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size
        )
        ropes = [config.rope if layer.rope is None else layer.rope for layer in options]
        tables = {
            rope: options[0].rotary_table.from_parameters(
                rope,
                config.head_dim,
                max_len=build.max_model_len,
                dtype=build.dtype,
                device=build.device,
            )
            for rope in set(ropes)
        }
        self.layers = nn.ModuleList(
            layer_class(index, config, layer, tables[rope], build)
            for index, (layer, rope) in enumerate(zip(options, ropes, strict=True))
        )
        self.norm = options[-1].norm(config.hidden_size, config.rms_norm_eps, build)

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
    """A Llama-like model; a family says how its layers differ, and of which kind they are."""

    batch_invariant: ClassVar[bool] = True
    layer_class: ClassVar[type[DecoderLayer | NormsAfterLayer]] = DecoderLayer
    weight_names: ClassVar[WeightNames] = WeightNames(
        # The attention layer holds the weights of the q and k norms, one level deeper than files.
        renamed={r"\.self_attn\.attn\.": ".self_attn."},
        ignored=(r".*\.rotary_emb\.inv_freq",),
    )

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        options = [self.layer_options(config, i) for i in range(config.num_hidden_layers)]
        self.model = DecoderStack(config, options, self.layer_class, build)
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
