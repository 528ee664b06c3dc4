"""Make the layers of a model: what a model's constructor receives as `build`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quire.errors import ConfigError
from quire.interfaces.model import AttentionOptions, LatentOptions
from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
)
from quire.layers.attention import Attention
from quire.layers.embedding import Embedding, Head, NoHead
from quire.layers.experts import Experts
from quire.layers.latent_attention import LatentAttention
from quire.layers.linear import Linear
from quire.layers.widened import WidenedWeight


class LayerBuilder:
    """Build layers for one rank; implements `quire.interfaces.model.BuildContext`.

    A layer that `quantization` leaves alone is kept as `dense` says. `generates`: logits are
    wanted, so there is a head.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        quantization: QuantizationMethod,
        dense: QuantizationMethod,
        batch_invariant: bool = False,
        generates: bool = True,
    ) -> None:
        self._generates = generates
        self.rank = 0
        self.world_size = 1
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self.batch_invariant = batch_invariant
        self._quantization = quantization
        self._dense = dense
        self._dtype_name = str(dtype).removeprefix("torch.")

    def _layer_method(self, spec: LinearSpec | EmbeddingSpec) -> LayerMethod:
        method = self._method(spec)
        assert isinstance(method, LayerMethod), spec
        return method

    def _refuse_unsupported(self, spec: LayerSpec) -> None:
        why_not = self._quantization.why_unsupported(spec)
        if why_not is None:
            return
        name = type(self._quantization).__name__
        is_mixture = isinstance(spec, ExpertsSpec)
        remedy = (
            " Experts are served in the model's own dtype, by fp8, and by methods that round "
            "weights alone: gptq, awq, pack-quantized, int4, int8-weight-only."
            if is_mixture
            else ""
        )
        raise ConfigError(f"{name} cannot serve {spec.name!r}: {why_not}.{remedy}")

    def _method(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod:
        self._refuse_unsupported(spec)
        method = self._quantization.method_for(spec)
        if method is None:
            why_not = self._dense.why_unsupported(spec)
            if why_not is not None:
                raise ConfigError(f"{spec.name!r} cannot be served: {why_not}")
            method = self._dense.method_for(spec)
        assert method is not None, spec
        return method

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        bias: bool = False,
        parts: Sequence[str] = (),
    ) -> nn.Module:
        """Make a linear layer; several `out_features` with their `parts` are fused into one."""
        spec = self._linear_spec(name, in_features, out_features, bias=bias, parts=parts)
        return Linear(spec, self._layer_method(spec))

    def _linear_spec(
        self,
        name: str,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        bias: bool = False,
        parts: Sequence[str] = (),
    ) -> LinearSpec:
        sizes = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        return LinearSpec(
            name=name,
            parts=tuple(parts) or (name.rpartition(".")[2],),
            in_features=in_features,
            output_sizes=sizes,
            bias=bias,
            dtype=self._dtype_name,
            device=str(self.device),
            batch_invariant=self.batch_invariant,
        )

    def _embedding_spec(self, name: str, rows: int, size: int, *, is_head: bool) -> EmbeddingSpec:
        return EmbeddingSpec(
            name=name,
            num_embeddings=rows,
            embedding_dim=size,
            is_head=is_head,
            dtype=self._dtype_name,
            device=str(self.device),
            batch_invariant=self.batch_invariant,
        )

    def embedding(self, name: str, num_embeddings: int, embedding_dim: int) -> nn.Module:
        """Make an embedding: module(token_ids [num_tokens]) -> [num_tokens, embedding_dim]."""
        spec = self._embedding_spec(name, num_embeddings, embedding_dim, is_head=False)
        return Embedding(spec, self._layer_method(spec))

    def head(
        self, name: str, embedding_dim: int, num_embeddings: int, *, tied_to: nn.Module | None
    ) -> nn.Module:
        """Make the layer that gives logits, with its own weight or that of an embedding."""
        assert tied_to is None or isinstance(tied_to, Embedding), tied_to
        if not self._generates:
            return NoHead(name)
        spec = self._embedding_spec(name, num_embeddings, embedding_dim, is_head=True)
        return Head(spec, self._layer_method(spec), tied_to)

    def attention(self, name: str, options: AttentionOptions) -> nn.Module:
        """Make an attention layer: module(qkv, batch) -> [num_tokens, num_heads * head_dim]."""
        if options.num_heads % options.num_kv_heads:
            raise ConfigError(
                f"{name}: num_attention_heads {options.num_heads} is not a multiple of "
                f"num_key_value_heads {options.num_kv_heads}."
            )
        slopes = options.alibi_slopes
        if slopes is not None and len(slopes) != options.num_heads:
            raise ConfigError(
                f"{name}: {len(slopes)} alibi_slopes for {options.num_heads} heads; one a head."
            )
        return Attention(
            options, self.dtype, self.device, name=name, batch_invariant=self.batch_invariant
        )

    def latent_attention(self, name: str, options: LatentOptions) -> nn.Module:
        """Make latent attention: module(q, kv, batch) -> [num_tokens, num_heads * v_head_dim]."""
        if self.batch_invariant:
            raise ConfigError(
                f"{name}: latent attention has no products that are the same whatever the batch; "
                f"leave --deterministic out."
            )
        own = self._widened(
            f"{name}.kv_b_proj",
            options.kv_lora_rank,
            options.num_heads * (options.qk_nope_head_dim + options.v_head_dim),
        )
        return LatentAttention(options, self.dtype, self.device, name=name, kv_b_proj=own)

    def _widened(self, name: str, in_features: int, out_features: int) -> nn.Module | None:
        """Make a weight that is multiplied in parts, where the checkpoint has it quantized.

        None: it is in full precision, and stays so.
        """
        if not getattr(self._quantization, "config", None):
            return None
        spec = self._linear_spec(name, in_features, out_features)
        self._refuse_unsupported(spec)
        method = self._quantization.method_for(spec)
        if method is None:
            return None
        assert isinstance(method, LayerMethod), spec
        return WidenedWeight(spec, method)

    def experts(
        self,
        name: str,
        num_experts: int,
        hidden_size: int,
        size: int,
        *,
        top_k: int,
        parts: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> nn.Module:
        """Make the experts: module(x, weights, expert_ids) -> [num_tokens, hidden_size]."""
        gate, up, down = parts
        spec = ExpertsSpec(
            name=name,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=size,
            dtype=self._dtype_name,
            device=str(self.device),
            batch_invariant=self.batch_invariant,
            top_k=top_k,
            parts=(gate, up, down),
        )
        method = self._method(spec)
        assert isinstance(method, ExpertsMethod), spec
        return Experts(spec, method)

    def parameter(self, *shape: int) -> nn.Parameter:
        """Make an empty parameter, such as a norm's weight."""
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(empty, requires_grad=False)
