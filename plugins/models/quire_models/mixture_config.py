"""config.json keys of mixtures of experts. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from quire.interfaces.model_config import flag, is_whole, key, refuse, whole
from quire_models.decoder_config import DecoderConfig, WindowedConfig

MOST_EXPERTS = 4096


def check_top_k(config: DecoderConfig, top_k: int, num_experts: int) -> None:
    """Raise ConfigError unless a token's experts are among those that there are."""
    if top_k > num_experts:
        allowed = f"whole numbers from 1 to the number of experts, {num_experts}"
        raise refuse(config.source, "num_experts_per_tok", top_k, allowed)


def _layers_key() -> Any:
    """Declare `mlp_only_layers`: null, or indices of layers."""

    def parse(given: Mapping[str, Any], source: str) -> Any:
        value = given.get("mlp_only_layers")
        return tuple(value) if isinstance(value, list) else () if value is None else value

    def check(value: Any) -> bool:
        return isinstance(value, tuple) and all(is_whole(v) and v >= 0 for v in value)

    allowed = "null, or a list of indices of layers, whole numbers from 0"
    return key((), check=check, allowed=allowed, names=("mlp_only_layers",), parse=parse)


@frozen(kw_only=True)
class SparseConfig(WindowedConfig):
    """Keys of a decoder some of whose layers have experts instead of one MLP, as in Qwen."""

    num_experts: int = whole(60, 0, MOST_EXPERTS, names=("num_experts", "num_local_experts"))
    num_experts_per_tok: int = whole(4, 1, MOST_EXPERTS)
    moe_intermediate_size: int = whole(1408, 1, 2**20)
    norm_topk_prob: bool = flag(False)
    decoder_sparse_step: int = whole(1, 1, 1024)
    mlp_only_layers: tuple[int, ...] = _layers_key()

    def check(self) -> None:
        """Check that there are as many experts as a token asks for."""
        super().check()
        if self.num_experts:
            check_top_k(self, self.num_experts_per_tok, self.num_experts)

    def has_experts(self, layer: int) -> bool:
        """Answer whether the layer has experts."""
        is_turn = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and is_turn and layer not in self.mlp_only_layers
