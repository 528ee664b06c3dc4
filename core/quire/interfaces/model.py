"""The contract of a model: what the core calls, and what it offers while the model is built."""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model_config import ModelConfig


@frozen(kw_only=True)
class WeightNames:
    """How a checkpoint's tensor names map to the model's; declarations, no code.

    Layers made by `BuildContext` are found by the names given there. `renamed` is for parameters:
    regular expressions that turn a name in the module tree into the checkpoint's. `ignored` are
    regular expressions of tensors that hold nothing to load, `transposed` of weights that files
    hold as [inputs, outputs].

    `ignored_with` has regular expressions of tensors that hold nothing to load in files that also
    have one which the other expression matches: further layers that predict tokens, for instance,
    by a projection that no other layer has.

    `base` is what names may begin with, or, in files of the model without its head, do not: either
    kind is read, whether the model's own names have it or not. `aliases` are regular expressions
    that turn a file's older name into today's.
    """

    renamed: Mapping[str, str] = {}
    ignored: Sequence[str] = ()
    transposed: Sequence[str] = ()
    base: str = "model."
    aliases: Mapping[str, str] = {}
    ignored_with: Mapping[str, str] = {}

    def ignored_among(self, names: Iterable[str]) -> list[str]:
        """Return expressions of what is not loaded of a file with these tensors."""
        found, given = list(self.ignored), list(names) if self.ignored_with else []
        for pattern, mark in self.ignored_with.items():
            if any(re.fullmatch(mark, name) for name in given):
                found.append(pattern)
        return found


class BuildContext(Protocol):
    """What a model's constructor gets: its rank, and makers of the layers that plugins decide.

    `name` is the module's name in the checkpoint, such as `model.layers.0.mlp.down_proj`.
    Weights are created empty, in `dtype` on `device`. `batch_invariant`: layers made here give a
    token the same bits whatever the step, and so must what the model does between them.
    """

    rank: int
    world_size: int
    dtype: Any
    device: Any
    max_model_len: int
    batch_invariant: bool

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

    def embedding(self, name: str, num_embeddings: int, embedding_dim: int) -> nn.Module:
        """Make an embedding: module(token_ids [num_tokens]) -> [num_tokens, embedding_dim]."""

    def head(
        self, name: str, embedding_dim: int, num_embeddings: int, *, tied_to: nn.Module | None
    ) -> nn.Module:
        """Make the layer that gives logits, with its own weight or that of an embedding."""

    def attention(self, name: str, options: AttentionOptions) -> nn.Module:
        """Make an attention layer: module(qkv, batch) -> [num_tokens, num_heads * head_dim]."""

    def latent_attention(self, name: str, options: LatentOptions) -> nn.Module:
        """Make a latent attention layer: module(q, kv, batch) -> [num_tokens, heads * v_head_dim].

        `q` [num_tokens, num_heads * (qk_nope_head_dim + qk_rope_head_dim)] and `kv` [num_tokens,
        kv_lora_rank + qk_rope_head_dim] are neither normed nor rotated. The layer's weights are
        `<name>.kv_a_layernorm.weight` [kv_lora_rank] and `<name>.kv_b_proj.weight`, for each head
        rows that make its keys, then rows that make its values. Where the checkpoint has the latter
        quantized it is read as its format says and kept in the model's dtype; else both are
        parameters, which no quantization plugin packs.
        """

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
        """Make the experts of a mixture, each with a gate and up projection to `size` and back.

        module(x, weights, expert_ids) -> [num_tokens, hidden_size], as
        `quire.interfaces.quantization.ExpertsMethod.apply_experts` says. Expert i's weights are
        `<name>.<i>.<part>.weight`, `parts` the names of gate, up and down. Raises: ConfigError
        where the weights' format, or the device, has no experts.
        """

    def parameter(self, *shape: int) -> nn.Parameter:
        """Make an empty parameter, such as a norm's weight."""


@frozen(kw_only=True)
class AttentionOptions:
    """What a model says about one attention layer; None or False: the layer has none of it.

    `layer_index` counts layers. `rotary` is a `quire.layers.rotary.RotaryTable`. With `qk_norm`
    an RMSNorm of eps `qk_norm` is applied to each head of q and k before the rotation; its
    weights are `<name>.q_norm.weight` and `<name>.k_norm.weight`. `alibi_slopes`, one a head, times
    a key's distance is taken from its score once that is scaled and capped.
    """

    layer_index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: Any | None = None
    qk_norm: float | None = None
    sliding_window: int | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    alibi_slopes: Sequence[float] | None = None
    causal: bool = True


@frozen(kw_only=True)
class LatentOptions:
    """What a model says about one layer of multi-head latent attention; names as in config.json.

    `scale` multiplies scores. `rotary` is the table of `qk_rope_head_dim` dimensions, `norm_eps`
    that of the latents' RMSNorm.
    """

    layer_index: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    rotary: Any
    norm_eps: float


class Model(nn.Module, abc.ABC):
    """A model as the core sees it. Tokens of all sequences lie end to end, without padding.

    The stages are separate so that pictures, drafts and pipeline stages can enter between them.
    `batch_invariant`: built where `BuildContext.batch_invariant` asks for it, it gives a token the
    same bits whatever else is in the step, and however its sequence is cut into steps.
    """

    weight_names: ClassVar[WeightNames] = WeightNames()
    batch_invariant: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config

    def finish_loading(self) -> None:
        """Check or prepare what needs a checkpoint's weights; called once they are all there.

        Raises: ConfigError, which ends the start.
        """

    @abc.abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the hidden states [num_tokens, hidden_size] that enter the first layer."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states [num_tokens, hidden_size], final norm included.

        Where `batch.rows_to_keep()` gives rows, those alone may be returned, in their order:
        [num_logit_rows, hidden_size].
        """

    @abc.abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [num_rows, vocab_size] of the given hidden states."""


class PoolingModel(Model):
    """A model that gives vectors or scores instead of tokens: an encoder, or one with a score head.

    The core makes one vector a sequence of what `forward` returns, as the checkpoint's settings
    say. A score head is given the first token's of an encoder, the last one's of a decoder. An
    encoder's attention layers are not causal: they keep no keys and values, so a sequence is
    computed whole, in one step. Its config's `kv_elements_per_token` is 0, and its `forward`
    returns all tokens.
    """

    def logits(self, hidden: Tensor) -> Tensor:
        """Raises: NotImplementedError, since there is no head for tokens."""
        raise NotImplementedError(f"{type(self).__name__} gives no logits")

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of `pooled` [num_seqs, hidden_size].

        Before softmax or sigmoid. Raises: NotImplementedError where the model has no such head.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no scores")
