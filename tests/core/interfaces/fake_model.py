"""A fake model: a full layer with sinks and soft cap, a windowed one; both normalise q and k."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, BuildContext, Model, WeightNames
from quire.interfaces.model_config import ModelConfig, whole
from quire.interfaces.quantization import QuantizedActivation
from quire.interfaces.rope import RopeParameters
from quire.layers.rotary import RotaryTable

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 4, 2, 8, 6
LAYERS = (
    {"sinks": True, "logit_softcap": 20.0},
    {"sliding_window": WINDOW},
)


@frozen(kw_only=True)
class FakeConfig(ModelConfig):
    """Small sizes."""

    vocab_size: int = whole(64, 1, 2**24)
    hidden_size: int = whole(HIDDEN, 1, 2**17)
    num_hidden_layers: int = whole(len(LAYERS), 1, 1024)

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * len(LAYERS) * KV_HEADS * HEAD_DIM


def emit(x: Tensor, layer: Any) -> Tensor | QuantizedActivation:
    """Return the activation in the format that the next layer's method asks for."""
    if layer.method.activation_format is None:
        return x
    assert layer.method.activation_format == "fake-int16-per-token"
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 32767
    return QuantizedActivation(values=(x / scales).round().to(torch.int16), scales=scales)


class FakeLayer(nn.Module):
    """Attention with a residual and a weight before it."""

    def __init__(self, index: int, rotary: RotaryTable, build: BuildContext) -> None:
        super().__init__()
        name = f"layers.{index}.attn"
        sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.gain = build.parameter(HIDDEN)
        self.qkv = build.linear(f"{name}.qkv", HIDDEN, sizes, bias=True, parts=("q", "k", "v"))
        options = AttentionOptions(
            layer_index=index,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=HEAD_DIM**-0.5,
            rotary=rotary,
            qk_norm=1e-5,
            causal=True,
            **LAYERS[index],
        )
        self.attn = build.attention(name, options)
        self.out = build.linear(f"{name}.out", HEADS * HEAD_DIM, HIDDEN)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """Return [num_tokens, hidden_size]."""
        attended = self.attn(self.qkv(emit(x * self.gain, self.qkv)), batch)
        return x + self.out(emit(attended, self.out))


class FakeModel(Model):
    """Everything that `BuildContext` offers."""

    weight_names: ClassVar[WeightNames] = WeightNames(
        renamed={r"\.attn\.([qk]_norm|sinks)": r".attn.\1", r"\.gain$": ".norm.weight"},
        ignored=(r"mask\..*",),
    )

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        assert (build.rank, build.world_size) == (0, 1)
        self.embedding = build.embedding("embed", config.vocab_size, HIDDEN)
        rotary = RotaryTable.from_parameters(
            RopeParameters(),
            HEAD_DIM,
            max_len=build.max_model_len,
            dtype=build.dtype,
            device=build.device,
        )
        self.layers = nn.ModuleList(FakeLayer(i, rotary, build) for i in range(len(LAYERS)))
        self.lm_head = build.head("lm_head", HIDDEN, config.vocab_size, tied_to=None)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings."""
        return self.embedding(token_ids)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Run the layers."""
        assert batch.segments is None, "nobody asked for a pair"
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the head's product."""
        return self.lm_head(hidden)


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Return a full-precision checkpoint by names."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("embed.weight", "lm_head.weight"), (64, HIDDEN)
    )
    for i, options in enumerate(LAYERS):
        name = f"layers.{i}.attn"
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{name}.{part}.weight"] = (heads * HEAD_DIM, HIDDEN)
            shapes[f"{name}.{part}.bias"] = (heads * HEAD_DIM,)
        shapes[f"{name}.out.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{name}.q_norm.weight"] = shapes[f"{name}.k_norm.weight"] = (HEAD_DIM,)
        shapes[f"layers.{i}.norm.weight"] = (HIDDEN,)
        if options.get("sinks"):
            shapes[f"{name}.sinks"] = (HEADS,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
