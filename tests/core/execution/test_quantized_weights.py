"""Weights of a quantized checkpoint: scales of parts, floats of 8 bits, memory that comes late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors_files import save
from torch import Tensor
from toy_model import HIDDEN, ToyConfig, ToyModel, toy_tensors

from quire.errors import CheckpointError
from quire.execution import staged_files, weights
from quire.execution.checkpoint import Checkpoint
from quire.execution.dummy_weights import draw_weights
from quire.execution.mapped_files import MappedFiles
from quire.execution.setup import weight_bytes
from quire.execution.staged_files import StagedFiles
from quire.execution.weights import load_weights
from quire.interfaces.quantization import (
    LayerMethod,
    LayerSpec,
    LinearSpec,
    QuantizationMethod,
    ShardRule,
)
from quire.layers.build import LayerBuilder
from quire_quant.none.method import NoQuantization

E4M3 = torch.float8_e4m3fn
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True, params=[MappedFiles, StagedFiles], ids=["mapped", "staged"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load as on a CPU, and as on a GPU but to the CPU."""
    monkeypatch.setitem(weights.SOURCES, "cpu", request.param)
    monkeypatch.setattr(staged_files, "BUFFER_BYTES", 48)


class Scaled(LayerMethod):
    """Weights in e4m3 with one scale a projection; what `finish_loading` saw is kept."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.scales: list[float] = []

    def create_weights(self, layer: Any) -> None:
        weight = torch.empty(
            self.spec.out_features, self.spec.in_features, dtype=E4M3, device="meta"
        )
        layer.add_weight("weight", weight, ShardRule(output_dim=0))
        count = len(self.spec.parts)
        rule = ShardRule(output_dim=0, part_sizes=(1,) * count)
        layer.add_weight("weight_scale", torch.empty(count), rule)

    def loaded_bytes(self, layer: Any) -> int:
        return 1000

    def settle_drawn(self, layer: Any) -> None:
        layer.get_weight("weight_scale").data.fill_(2.0)

    def finish_loading(self, layer: Any) -> None:
        self.scales = layer.get_weight("weight_scale").tolist()

    def apply(self, layer: Any, x: Any, bias: Any) -> Tensor:
        raise NotImplementedError("nothing is multiplied here")


class ScaledLinears(QuantizationMethod):
    """Linear layers alone."""

    def why_unsupported(self, spec: LayerSpec) -> None:
        return None

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        return Scaled(spec) if isinstance(spec, LinearSpec) else None


def build() -> ToyModel:
    dense = NoQuantization({})
    builder = LayerBuilder(
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=64,
        quantization=ScaledLinears({}),
        dense=dense,
    )
    return ToyModel(ToyConfig(), builder)


def tensors_with(scale: Tensor) -> dict[str, Tensor]:
    """Return a checkpoint in which q, k, v and o have 1, 2, 3 and 4 times a scale."""
    tensors = toy_tensors()
    for number, part in enumerate((*QKV, "o_proj"), 1):
        name = f"model.layers.0.self_attn.{part}"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(E4M3)
        tensors[f"{name}.weight_scale"] = scale * number
    return tensors


@pytest.mark.parametrize("shape", [(), (1,)])
def test_each_projection_fills_its_own_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = tensors_with(torch.ones(shape))
    save(tmp_path, tensors)
    model = build()

    load_weights(model, Checkpoint.open(tmp_path))

    attention = model.layers[0]
    assert attention.qkv_proj.method.scales == [1.0, 2.0, 3.0]
    assert attention.o_proj.method.scales == [4.0]
    wanted = torch.cat([tensors[f"model.layers.0.self_attn.{p}.weight"].float() for p in QKV])
    assert torch.equal(attention.qkv_proj.get_weight("weight").float(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_eight_bits_are_not_made_of_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tensors_with(torch.ones(1))
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=rf"'{name}' is .*, expected float8_e4m3fn"):
        load_weights(build(), Checkpoint.open(tmp_path))


def test_eight_bits_without_their_scale_are_not_widened(tmp_path: Path) -> None:
    tensors = tensors_with(torch.ones(1))
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(E4M3)
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is F8_E4M3, expected float32"):
        load_weights(build(), Checkpoint.open(tmp_path))


def test_nan_of_eight_bits_is_found(tmp_path: Path) -> None:
    tensors = tensors_with(torch.ones(1))
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0xFF
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=rf"'{name}' holds NaN"):
        load_weights(build(), Checkpoint.open(tmp_path))


def test_missing_scale_is_named(tmp_path: Path) -> None:
    tensors = tensors_with(torch.ones(1))
    name = "model.layers.0.self_attn.v_proj.weight_scale"
    del tensors[name]
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        load_weights(build(), Checkpoint.open(tmp_path))


def test_scale_of_several_numbers_is_refused_where_one_is_wanted(tmp_path: Path) -> None:
    save(tmp_path, tensors_with(torch.ones(2)))

    with pytest.raises(CheckpointError, match=r"k_proj.weight_scale \[2\] instead of \[1\]"):
        load_weights(build(), Checkpoint.open(tmp_path))


def test_drawn_weights_are_settled_before_they_are_repacked() -> None:
    model = build()

    draw_weights(model, seed=0)

    assert model.layers[0].qkv_proj.method.scales == [2.0, 2.0, 2.0]
    assert model.layers[0].qkv_proj.get_weight("weight").float().std() > 0


def test_bytes_of_weights_are_those_that_stay() -> None:
    embedding_and_head, norm, qkv_bias = 2 * 11 * HIDDEN, HIDDEN, 2 * HIDDEN

    assert weight_bytes(build()) == 2 * 1000 + 4 * (embedding_and_head + norm + qkv_bias)
