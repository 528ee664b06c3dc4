"""Models with one mistake each, and what the kit should say of it."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from small_decoder import Norm, SmallConfig, SmallDecoder, SmallLayer
from torch import Tensor
from torch.nn import functional

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, WeightNames
from quire.interfaces.rope import RopeParameters

BROKEN: dict[str, type[SmallDecoder]] = {}
SAYS: dict[str, str] = {}


def broken(name: str, says: str) -> Any:
    """Enter a model into the list; `says` is part of what the kit should report."""

    def enter(model: type[SmallDecoder]) -> type[SmallDecoder]:
        BROKEN[name] = model
        SAYS[name] = says
        return model

    return enter


@broken("wrong-rope-base", "RoPE has the base 10000")
class WrongRopeBase(SmallDecoder):
    def rope(self, config: SmallConfig) -> RopeParameters:
        return RopeParameters(rope_theta=10_000.0)


@broken("another-rope-base", "got ")
class AnotherRopeBase(SmallDecoder):
    def rope(self, config: SmallConfig) -> RopeParameters:
        return attrs.evolve(config.rope, rope_theta=500_000.0)


@broken("not-rotated", "queries and keys are not rotated")
class NotRotated(SmallDecoder):
    def attention_options(self, index: int, config: SmallConfig) -> AttentionOptions:
        return attrs.evolve(super().attention_options(index, config), rotary=None)


@broken("final-norm-missing", "the final norm is missing")
class FinalNormMissing(SmallDecoder):
    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        return x if where == "final" else super().normed(x, norm, where)


@broken("norm-before-the-mlp-missing", "the norm before the MLP is missing")
class NormBeforeMlpMissing(SmallDecoder):
    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        return x if where == "mlp" else super().normed(x, norm, where)


@broken("gate-and-up-swapped", "gate and up are swapped")
class GateAndUpSwapped(SmallDecoder):
    mlp_parts = ("up_proj", "gate_proj")


@broken("gelu-instead-of-silu", "got ")
class GeluInsteadOfSilu(SmallDecoder):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate) * up


@broken("attention-not-scaled", "attention scores are not scaled")
class AttentionNotScaled(SmallDecoder):
    def scale(self, config: SmallConfig) -> float:
        return 1.0


@broken("scaled-by-hidden-size", "scaled by hidden_size instead of head_dim")
class ScaledByHiddenSize(SmallDecoder):
    def scale(self, config: SmallConfig) -> float:
        return config.hidden_size**-0.5


@broken("eps-fixed", "the norms have an eps of 1e-6")
class EpsFixed(SmallDecoder):
    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        kept, self.config = self.config, attrs.evolve(self.config, rms_norm_eps=1e-6)
        found = super().normed(x, norm, where)
        self.config = kept
        return found


@broken("weights-of-a-layer-ignored", "model.layers.1.")
class WeightsOfALayerIgnored(SmallDecoder):
    """Layer 1 is built, and its tensors are left in the file."""

    weight_names = WeightNames(ignored=(r".*\.inv_freq", r"model\.layers\.1\..*"))


@broken("layer-left-out", "of the real class has no place")
class LayerLeftOut(SmallDecoder):
    def __init__(self, config: SmallConfig, build: BuildContext) -> None:
        super().__init__(attrs.evolve(config, num_hidden_layers=1), build)


@broken("layer-left-out-and-ignored", "and the real class computes with it")
class LayerLeftOutAndIgnored(LayerLeftOut):
    weight_names = WeightNames(ignored=(r".*\.inv_freq", r"model\.layers\.1\..*"))


@broken("layers-of-one-name", "two layers were given the same name")
class LayersOfOneName(SmallDecoder):
    def name_of_layer(self, index: int) -> str:
        return "model.layers.0"


@broken("norm-weight-never-used", "the weights of the norms are not used")
class NormWeightNeverUsed(SmallDecoder):
    """Right where all weights of norms are one."""

    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        ones = Norm.__new__(Norm)
        torch.nn.Module.__init__(ones)
        ones.weight = torch.nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)
        return super().normed(x, ones, where)


@broken("tie-ignored", "the head is tied to the embedding")
class TieIgnored(SmallDecoder):
    def ties_head(self, config: SmallConfig) -> bool:
        return True


@broken("positions-of-the-step", "depend on how a step is cut")
class PositionsOfTheStep(SmallDecoder):
    """Counts positions from the first token of a step."""

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        positions = [torch.arange(n, dtype=torch.int32) for n in batch.query_lens]
        return super().forward(hidden, attrs.evolve(batch, positions=torch.cat(positions)))


@broken("mean-of-the-batch", "sequence")
class MeanOfTheBatch(SmallDecoder):
    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        if where == "final":
            x = x - 0.1 * x.mean(0, keepdim=True)
        return super().normed(x, norm, where)


@broken("batch-changed", "batch.positions was changed")
class BatchChanged(SmallDecoder):
    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        out = super().forward(hidden, batch)
        batch.positions += 1
        return out


@broken("wide-logits", "logits gives torch.float64")
class WideLogits(SmallDecoder):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).double()


@broken("wanted-rows-in-another-order", "not in the order of logit_rows")
class WantedRowsInAnotherOrder(SmallDecoder):
    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        out, rows = super().forward(hidden, batch), batch.rows_to_keep()
        return out if rows is None else out.index_select(0, rows.flip(0))


@broken("residual-dropped", "got ")
class ResidualDropped(SmallDecoder):
    dropped: ClassVar[float] = 1.0

    def attended(self, layer: SmallLayer, x: Tensor, batch: Batch) -> Tensor:
        return super().attended(layer, x, batch) - self.dropped * x


@broken("keys-and-values-swapped", "got ")
class KeysAndValuesSwapped(SmallDecoder):
    def __init__(self, config: SmallConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        kv_size = config.num_key_value_heads * config.head_dim
        self.sizes = (config.hidden_size, kv_size, kv_size)

    def attended(self, layer: SmallLayer, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = layer.qkv(x).split(self.sizes, -1)
        return layer.o_proj(layer.attention(torch.cat((q, v, k), -1), batch))


@broken("one-index-for-all-layers", "2 attention layers have layer_index 0")
class OneIndexForAllLayers(SmallDecoder):
    def attention_options(self, index: int, config: SmallConfig) -> AttentionOptions:
        return super().attention_options(0, config)


@broken("one-attention-for-all-layers", "got ")
class OneAttentionForAllLayers(SmallDecoder):
    """The second layer writes its keys over those of the first."""

    def attended(self, layer: SmallLayer, x: Tensor, batch: Batch) -> Tensor:
        first = self.model.layers[0]
        return layer.o_proj(first.attention(layer.qkv(x), batch))


@broken("positions-cut", "got ")
class PositionsCut(SmallDecoder):
    """The table of angles ends early, and later tokens take its last row."""

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        return super().forward(hidden, attrs.evolve(batch, positions=batch.positions.clamp(max=9)))


@broken("embedding-scaled", "got ")
class EmbeddingScaled(SmallDecoder):
    def embed(self, token_ids: Tensor) -> Tensor:
        return super().embed(token_ids) * self.config.hidden_size**0.5


@broken("angles-of-the-first-step", "what is kept of earlier tokens")
class AnglesOfTheFirstStep(SmallDecoder):
    """Positions are kept by the number of tokens."""

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept: dict[int, Tensor] = {}
        positions = self.kept.setdefault(len(batch.positions), batch.positions.clone())
        return super().forward(hidden, attrs.evolve(batch, positions=positions))


@broken("padded-vocabulary", "logits")
class PaddedVocabulary(SmallDecoder):
    def logits(self, hidden: Tensor) -> Tensor:
        return functional.pad(super().logits(hidden), (0, 3))


@broken("squares-in-half-precision", "got ")
class SquaresInHalfPrecision(SmallDecoder):
    def normed(self, x: Tensor, norm: Norm, where: str) -> Tensor:
        half = x.half()
        variance = half.square().mean(-1, keepdim=True).to(x.dtype)
        return x * (variance + self.config.rms_norm_eps).rsqrt() * norm.weight
