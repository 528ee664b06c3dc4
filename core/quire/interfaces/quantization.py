"""The contract of a quantization method: it decides how a layer keeps and applies its weights."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor


# As safetensors spells them.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


@frozen(kw_only=True)
class ShardRule:
    """How one weight is cut: along which dimension outputs, inputs and packed values lie.

    `pack_factor` values share one element along `packed_dim`; `group_size` inputs share one
    scale. A dimension that is None is not cut. `part_sizes` are what the projections of a fused
    layer have along `output_dim` where it is not their outputs: 1 each for a scale of the whole
    projection, blocks for one of blocks.
    """

    output_dim: int | None = None
    input_dim: int | None = None
    packed_dim: int | None = None
    pack_factor: int = 1
    group_size: int | None = None
    part_sizes: tuple[int, ...] | None = None


@frozen(kw_only=True)
class LinearSpec:
    """A matrix product y = x W^T + b, possibly several projections fused along the outputs.

    `name` is the checkpoint's module name of the whole, `parts` the names of the projections,
    `output_sizes` their sizes, this rank's. `batch_invariant`: `--deterministic` asks for a
    `LayerMethod` that is.
    """

    name: str
    parts: tuple[str, ...]
    in_features: int
    output_sizes: tuple[int, ...]
    bias: bool
    dtype: str
    device: str
    batch_invariant: bool = False

    @property
    def out_features(self) -> int:
        """Outputs of all projections together."""
        return sum(self.output_sizes)


@frozen(kw_only=True)
class ExpertsSpec:
    """The experts of a mixture: fused gate and up projections, and down projections.

    Expert i's projections are `<name>.<i>.<part>` in the checkpoint, `parts` the names of gate,
    up and down. `top_k` experts serve a token.
    """

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    device: str
    batch_invariant: bool = False
    top_k: int = 1
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@frozen(kw_only=True)
class EmbeddingSpec:
    """A table of token embeddings; `is_head`: it also, or only, gives the logits."""

    name: str
    num_embeddings: int
    embedding_dim: int
    is_head: bool
    dtype: str
    device: str
    batch_invariant: bool = False


@frozen(kw_only=True)
class KVCacheSpec:
    """The KV cache of one layer."""

    name: str
    num_kv_heads: int
    head_dim: int
    kv_dtype: str


LayerSpec = LinearSpec | ExpertsSpec | EmbeddingSpec | KVCacheSpec


@frozen(kw_only=True)
class QuantizedActivation:
    """An activation that its producer has quantized: `values` [num_tokens, features] and scales."""

    values: Tensor
    scales: Tensor


@frozen(kw_only=True)
class EncodedWeight:
    """One projection's weight as a checkpoint of a format holds it.

    `tensors` by their names behind the module's, such as "weight_scale"; `weight` float64
    [out_features, in_features] is what they stand for.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor


class WeightLayer(Protocol):
    """What a LayerMethod sees of a layer: its spec and a place for its weights."""

    spec: Any

    def add_weight(self, name: str, tensor: Tensor, rule: ShardRule) -> None:
        """Register a weight that the checkpoint fills."""

    def get_weight(self, name: str) -> Tensor:
        """Return a registered weight."""

    def drop_weight(self, name: str) -> None:
        """Forget a weight, for instance after it was repacked."""


class WeightMethod(abc.ABC):
    """Keep the weights of one layer: what `LayerMethod` and `ExpertsMethod` share.

    With `batch_invariant` a row comes out with the same bits whatever else is in the batch; a
    method that costs more so is returned for specs that ask for it.
    """

    batch_invariant: ClassVar[bool] = False

    @abc.abstractmethod
    def create_weights(self, layer: WeightLayer) -> None:
        """Register empty weights on the layer's device with their shard rules.

        A weight that `finish_loading` drops may be registered on device `meta`: it gets memory
        just before it is filled, so that a model never lies on the device in a wide format.
        """

    def finish_loading(self, layer: WeightLayer) -> None:  # noqa: B027 - optional
        """Repack after the checkpoint was read; may drop and add weights."""

    def loaded_bytes(self, layer: WeightLayer) -> int | None:
        """Return the bytes that the layer will hold once it is loaded, without its bias.

        Asked before `finish_loading`, also on device `meta`. None: those of its weights.
        """
        return None

    def settle_drawn(self, layer: WeightLayer) -> None:  # noqa: B027 - optional
        """Make of weights drawn at random, as for `--load-format dummy`, what could be loaded.

        Called before `finish_loading`; a format may need scales that are positive, for instance.
        """


class LayerMethod(WeightMethod):
    """Keep and apply the weights of one layer that is a product or a look-up.

    `activation_format` names what the operation before the layer should emit: None for a plain
    tensor, or a name that `quire_kernels.ops` knows, such as "fp8-per-token".
    """

    activation_format: ClassVar[str | None] = None

    @abc.abstractmethod
    def apply(
        self, layer: WeightLayer, x: Tensor | QuantizedActivation, bias: Tensor | None
    ) -> Tensor:
        """Return the layer's output for `x` [num_tokens, in_features]."""

    def dequantize(self, layer: WeightLayer) -> Tensor | None:
        """Return the weight [out_features, in_features] that the layer multiplies with, wide.

        For checks, never while serving. None: not offered.
        """
        return None

    def rounded_input(self, layer: WeightLayer, x: Tensor) -> Tensor | None:
        """Return what the layer multiplies instead of `x` [num_tokens, in_features], wide.

        For checks, as `dequantize`. None: `x` as it is.
        """
        return None

    def apply_after_norm(
        self,
        layer: WeightLayer,
        addends: tuple[Tensor, Tensor],
        norm: tuple[Tensor, float],
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Add, norm and apply in one pass; return output and sum, or None: not offered.

        `addends` are two tensors [num_tokens, in_features], of which the first may be changed;
        `norm` is the weight and the epsilon of an RMSNorm of their sum. The model does the steps
        itself where None comes back, which may depend on the number of tokens.
        """
        return None

    def apply_gated_after_norm(
        self, layer: WeightLayer, addends: tuple[Tensor, Tensor], norm: tuple[Tensor, float]
    ) -> tuple[Tensor, Tensor] | None:
        """Do the same for a layer of two parts without bias; return silu(first) * second."""
        return None

    def apply_after_silu_mul(
        self, layer: WeightLayer, gate_up: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Apply to silu(first half) * second half of `gate_up` [num_tokens, 2 * in_features].

        For a layer that rounds its inputs, so that it does so in the pass that makes them. The
        model does the steps itself where None comes back, as for `apply_after_norm`.
        """
        return None


class ExpertsMethod(WeightMethod):
    """Keep and apply the weights of a mixture's experts.

    `create_weights` names them `gate_up_<leaf>` and `down_<leaf>`, each with all experts along
    the first dimension, gates before ups along `output_dim`; the checkpoint's tensor of one
    projection is `<leaf>`, such as "weight".
    """

    @abc.abstractmethod
    def apply_experts(
        self, layer: WeightLayer, x: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> Tensor:
        """Return the weighted sums of what the chosen experts make, [num_tokens, hidden_size].

        `x` [num_tokens, hidden_size]; `weights` floats and `expert_ids` int64, both
        [num_tokens, top_k], the ids of a row all different. On CUDA nothing is read back.
        """


@frozen(kw_only=True)
class InputMoments:
    """What came into a linear layer while a model was calibrated.

    `second` float32 [in_features, in_features]: the mean of x x^T over the inputs x;
    `magnitude` float32 [in_features]: the mean of |x|.
    """

    second: Tensor
    magnitude: Tensor


@frozen(kw_only=True)
class QuantizerOptions:
    """What a user asks of a `WeightQuantizer`; None where the choice is left to it.

    `dtype` is the model's. `group_size` -1: all inputs are one group. `damping` is a share of the
    mean of the diagonal of the inputs' second moments.
    """

    dtype: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    damping: float | None = None


class WeightQuantizer(abc.ABC):
    """Write the layers of a checkpoint in a format that some `QuantizationMethod` reads.

    `needs_inputs`: `quantize` wants the moments of the inputs; else it is given None.
    """

    needs_inputs: ClassVar[bool] = False

    @abc.abstractmethod
    def __init__(self, options: QuantizerOptions) -> None:
        """Take the options. Raises: ConfigError naming one that is not served."""

    @abc.abstractmethod
    def config(self, excluded: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`; the modules in `excluded` are left alone."""

    @abc.abstractmethod
    def quantize(
        self, weights: Sequence[Tensor], moments: InputMoments | None
    ) -> list[dict[str, Tensor]]:
        """Return the tensors of each projection, by their names behind the module's.

        `weights` float32 [outputs, in_features] are those of projections with the same inputs;
        they may be changed. Equal arguments give equal bits.
        """

    def smooth(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor | None:
        """Return a factor above 0 for each input, float32 [in_features]; None: not offered.

        The weights are multiplied by it and what makes the inputs is divided by it, where that
        can be done without changing the model's function.
        """
        return None


class QuantizationMethod(abc.ABC):
    """Choose a LayerMethod for each layer of a checkpoint.

    `example_config` is a `quantization_config` of the format that `encode` writes. `stored` has the
    dtypes of the checkpoint's tensors by their names, as safetensors spells them, once the core has
    seen its files; it is empty where there are none, as for `--load-format dummy`.
    """

    example_config: ClassVar[Mapping[str, Any]] = {}
    stored: Mapping[str, str] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`, or {} where asked for on the fly.

        Raises: ConfigError naming the key.
        """
        self.config = config

    def is_plain(self, module: str) -> bool:
        """Answer whether the checkpoint holds a module's weight in full precision."""
        return self.stored.get(f"{module}.weight") in _PLAIN_DTYPES

    @abc.abstractmethod
    def why_unsupported(self, spec: LayerSpec) -> str | None:
        """Return None if the method can serve the layer here, else why not, in a sentence."""

    @abc.abstractmethod
    def method_for(self, spec: LayerSpec) -> LayerMethod | ExpertsMethod | None:
        """Return how to keep the layer, or None: leave it in the model's dtype.

        An `ExpertsMethod` for an `ExpertsSpec`, else a `LayerMethod`.
        """

    @classmethod
    def encode(cls, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        """Return `weight` float32 [out_features, in_features] as a checkpoint holds it.

        `weight` is one of the projections of `spec`. For checks; None: not offered, as for a
        method that makes its weights itself out of a full-precision checkpoint.
        """
        return None
