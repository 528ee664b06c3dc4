"""A small model with one of each layer: embedding, fused linear, bias, norm, attention, head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.interfaces.model_config import ModelConfig, whole
from quire.layers.build import LayerBuilder
from quire_quant.none.method import NoQuantization

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 11, 8, 4, 2, 2


@frozen(kw_only=True)
class ToyConfig(ModelConfig):
    """A ModelConfig whose sizes are small."""

    vocab_size: int = whole(VOCAB, 1, 2**24)
    hidden_size: int = whole(HIDDEN, 1, 2**17)
    num_hidden_layers: int = whole(1, 1, 1024)

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_hidden_layers * KV_HEADS * HEAD_DIM


class Scale(nn.Module):
    """A module with a plain parameter, as norms have."""

    def __init__(self, build: BuildContext) -> None:
        super().__init__()
        self.weight = build.parameter(HIDDEN)


class ToyLayer(nn.Module):
    """Project, attend, project back; the residual is added."""

    def __init__(self, index: int, build: BuildContext, options: dict[str, Any]) -> None:
        super().__init__()
        name = f"model.layers.{index}.self_attn"
        self.norm = Scale(build)
        sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.qkv_proj = build.linear(
            f"{name}.qkv_proj", HIDDEN, sizes, bias=True, parts=("q_proj", "k_proj", "v_proj")
        )
        self.attn = build.attention(
            name,
            AttentionOptions(
                layer_index=index,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                scale=1.0,
                **options,
            ),
        )
        self.o_proj = build.linear(f"{name}.o_proj", HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        return x + self.o_proj(self.attn(self.qkv_proj(x * self.norm.weight), batch))


class ToyModel(Model):
    """Tied or not, as the config says; `attention_options[i]` change layer i."""

    weight_names: ClassVar[WeightNames] = WeightNames(
        renamed={r"^layers\.": "model.layers.", r"\.attn\.": ".self_attn."},
        ignored=(r".*\.inv_freq",),
    )
    attention_options: ClassVar[dict[int, dict[str, Any]]] = {}

    def __init__(self, config: ToyConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.embed_tokens = build.embedding("model.embed_tokens", config.vocab_size, HIDDEN)
        self.layers = nn.ModuleList(
            ToyLayer(i, build, self.attention_options.get(i, {}))
            for i in range(config.num_hidden_layers)
        )
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = build.head("lm_head", HIDDEN, config.vocab_size, tied_to=tied)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings."""
        return self.embed_tokens(token_ids)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's product."""
        return self.lm_head(hidden)


def build_toy(
    *,
    dtype: torch.dtype = torch.float32,
    kind: type[ToyModel] = ToyModel,
    device: str = "cpu",
    **keys: Any,
) -> ToyModel:
    """Build a model whose parameters hold what must not be left there: NaN."""
    builder = LayerBuilder(
        dtype=dtype,
        device=torch.device(device),
        max_model_len=64,
        quantization=NoQuantization({}),
        dense=NoQuantization({}),
    )
    model = kind(ToyConfig(**keys), builder)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def toy_tensors(
    *, layers: int = 1, tied: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return a checkpoint for the model, by names as Hugging Face spells them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        shapes[f"model.layers.{i}.norm.weight"] = (HIDDEN,)
        attention = f"model.layers.{i}.self_attn"
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            shapes[f"{attention}.{part}.weight"] = (heads * HEAD_DIM, HIDDEN)
            shapes[f"{attention}.{part}.bias"] = (heads * HEAD_DIM,)
        shapes[f"{attention}.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
