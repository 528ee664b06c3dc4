"""What encoders of BERT's kind share: embeddings, the layer, the stack, the heads for scores."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as functional
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, PoolingModel, WeightNames
from quire_models.encoder_config import EncoderConfig

APPROXIMATE = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@frozen(kw_only=True)
class LayerNames:
    """What a family calls the parts of a layer in its files."""

    layer: str = "encoder.layer"
    attention: str = "attention.self"
    parts: tuple[str, str, str] = ("query", "key", "value")
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"


class LayerNorm(nn.Module):
    """Subtract the mean and divide by the deviation, then scale and shift."""

    def __init__(self, size: int, eps: float, build: BuildContext) -> None:
        super().__init__()
        self.weight, self.bias = build.parameter(size), build.parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` [num_tokens, size]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def activate(name: str, x: Tensor) -> Tensor:
    """Return the activation of a config's `hidden_act`."""
    if name.startswith("gelu"):
        return functional.gelu(x, approximate="tanh" if name in APPROXIMATE else "none")
    return functional.relu(x) if name == "relu" else functional.silu(x)


class EncoderLayer(nn.Module):
    """Attention and an MLP, each added to its input and normalised after.

    `attend` is a module (qkv, batch), or (qkv, batch, bias) where a family adds something to
    the scores, -> [num_tokens, hidden_size].
    """

    def __init__(
        self,
        name: str,
        config: EncoderConfig,
        names: LayerNames,
        attend: nn.Module,
        build: BuildContext,
    ) -> None:
        super().__init__()
        hidden, size, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.hidden_act = config.hidden_act
        self.qkv = build.linear(
            f"{name}.{names.attention}.qkv", hidden, (hidden,) * 3, bias=True, parts=names.parts
        )
        self.attend = attend
        self.output = build.linear(f"{name}.{names.output}", hidden, hidden, bias=True)
        self.attention_norm = LayerNorm(hidden, eps, build)
        self.up = build.linear(f"{name}.{names.up}", hidden, size, bias=True)
        self.down = build.linear(f"{name}.{names.down}", size, hidden, bias=True)
        self.norm = LayerNorm(hidden, eps, build)

    def forward(self, x: Tensor, batch: Batch, bias: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        more = () if bias is None else (bias,)
        attended = self.output(self.attend(self.qkv(x), batch, *more))
        x = self.attention_norm(x + attended)
        found: Tensor = self.norm(x + self.down(activate(self.hidden_act, self.up(x))))
        return found


class Embeddings(nn.Module):
    """Words, positions and, where a family has them, the texts of a pair, added and normalised."""

    def __init__(self, config: EncoderConfig, build: BuildContext, *, has_types: bool) -> None:
        super().__init__()
        name, hidden = "embeddings", config.hidden_size
        self.words = build.embedding(f"{name}.word_embeddings", config.vocab_size, hidden)
        self.positions = build.embedding(
            f"{name}.position_embeddings", config.max_position_embeddings, hidden
        )
        self.types: nn.Module | None = None
        if has_types:
            count = config.type_vocab_size
            self.types = build.embedding(f"{name}.token_type_embeddings", count, hidden)
            self.num_types = count
        self.LayerNorm = LayerNorm(hidden, config.layer_norm_eps, build)

    def forward(self, words: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """Return [num_tokens, hidden_size] of the words' vectors and the rows of the positions."""
        x = words + self.positions(positions)
        if self.types is not None:
            if segments is None or self.num_types == 1:
                segments = torch.zeros_like(positions)
            x = x + self.types(segments)
        found: Tensor = self.LayerNorm(x)
        return found


class TwoProducts(nn.Module):
    """The head of RoBERTa and MPNet: two products with a tanh between them."""

    def __init__(self, name: str, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__()
        size = config.hidden_size
        self.dense = build.linear(f"{name}.dense", size, size, bias=True)
        self.out_proj = build.linear(f"{name}.out_proj", size, config.num_labels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return [num_seqs, num_labels] for `x` [num_seqs, hidden_size]."""
        found: Tensor = self.out_proj(self.dense(x).tanh())
        return found


class Encoder(PoolingModel):
    """An encoder of BERT's kind; a family says what its files call things."""

    names: ClassVar[LayerNames] = LayerNames()
    has_types: ClassVar[bool] = True

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.embeddings = Embeddings(config, build, has_types=self.has_types)
        self.encoder = nn.ModuleList(
            self._layer(f"{self.names.layer}.{index}", index, config, build)
            for index in range(config.num_hidden_layers)
        )

    def _layer(
        self, name: str, index: int, config: EncoderConfig, build: BuildContext
    ) -> EncoderLayer:
        attend = self.attention(f"{name}.{self.names.attention}", index, config, build)
        return EncoderLayer(name, config, self.names, attend, build)

    def attention(
        self, name: str, index: int, config: EncoderConfig, build: BuildContext
    ) -> nn.Module:
        """Return what attends in a layer: to all tokens of the sequence, unless overridden."""
        head_dim = config.hidden_size // config.num_attention_heads
        options = AttentionOptions(
            layer_index=index,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            causal=False,
        )
        return build.attention(name, options)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the words' vectors [num_tokens, hidden_size]."""
        found: Tensor = self.embeddings.words(token_ids)
        return found

    def position_rows(self, batch: Batch) -> Tensor:
        """Return the rows [num_tokens] of the table of positions."""
        return batch.positions

    def bias(self, batch: Batch) -> Tensor | None:
        """Return what all layers add to the scores; None: nothing."""
        return None

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the last hidden states of all tokens."""
        bias = self.bias(batch)
        x: Tensor = self.embeddings(hidden, self.position_rows(batch), batch.segments)
        for layer in self.encoder:
            x = layer(x, batch, bias)
        return x


class PaddedPositions(Encoder):
    """Positions as RoBERTa counts them: from the padding token's id on, which counts for none."""

    def position_rows(self, batch: Batch) -> Tensor:
        """Return the padding's row for its tokens, else how many others there are so far."""
        config = self.config
        assert isinstance(config, EncoderConfig), type(config)
        padding = config.first_position - 1
        counts = (batch.token_ids != padding).long()
        total = counts.cumsum(0)
        starts = batch.cu_seqlens_q[:-1].long()
        before = (total - counts)[starts].repeat_interleave(
            batch.cu_seqlens_q.diff().long(), output_size=len(counts)
        )
        return (((total - before) * counts) + padding).int()


def weight_names(base: str, names: LayerNames) -> WeightNames:
    """Return how the files of a family spell what lies in the module tree."""
    layer = r"^encoder\.(\d+)\."
    return WeightNames(
        base=base,
        # As the first files, which came from TensorFlow, have them.
        aliases={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
        renamed={
            layer + r"attention_norm\.": rf"{names.layer}.\1.{names.attention_norm}.",
            layer + r"norm\.": rf"{names.layer}.\1.{names.norm}.",
        },
        # Of heads that nobody asks for, and numbers that are counted here.
        ignored=(r"(.*\.)?pooler\..*", r".*\.position_ids", r"(cls|lm_head|vocab_\w+)\..*"),
    )
