"""Random weights: never zero, the same for the same seed, and repacked as real ones are."""

from __future__ import annotations

import pytest
import torch
from toy_model import build_toy

from quire.execution.dummy_weights import STD, draw_weights
from quire.layers.weights import WeightStore


def drawn(seed: int = 0, **keys: object) -> dict[str, torch.Tensor]:
    """Return the parameters of a model that was filled."""
    model = build_toy(**keys)  # type: ignore[arg-type]
    draw_weights(model, seed=seed)
    return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_finite_and_not_constant(dtype: torch.dtype) -> None:
    for name, data in drawn(dtype=dtype).items():
        assert torch.isfinite(data.float()).all(), name
        assert data.float().abs().max() > 0, name
        assert data.unique().numel() > 1, name


def test_shapes_are_those_of_the_model() -> None:
    wanted = {name: p.shape for name, p in build_toy().named_parameters()}

    assert {name: data.shape for name, data in drawn().items()} == wanted


def test_layers_have_mean_0_and_norms_mean_1() -> None:
    found = drawn()

    assert abs(found["layers.0.o_proj.weight"].mean()) < STD
    assert abs(found["layers.0.norm.weight"].mean() - 1) < STD
    assert 0.5 * STD < found["embed_tokens.weight"].std() < 2 * STD


def test_same_seed_gives_the_same_weights_and_another_others() -> None:
    first, again, other = drawn(3), drawn(3), drawn(4)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_finishes_loading_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    monkeypatch.setattr(
        WeightStore, "finish_loading", lambda layer: finished.append(layer.spec.name)
    )

    drawn(tie_word_embeddings=tied)

    layers = [m.spec.name for m in build_toy().modules() if isinstance(m, WeightStore)]
    assert sorted(finished) == sorted(layers)


def test_a_format_that_cannot_be_drawn_is_filled_through_another() -> None:
    model = build_toy()
    weight = model.layers[0].o_proj.get_weight("weight")
    weight.data = weight.data.to(torch.float8_e4m3fn)

    draw_weights(model, seed=0)

    assert weight.data.float().abs().max() > 0


def test_whole_numbers_are_drawn_from_their_range() -> None:
    model = build_toy()
    weight = model.layers[0].o_proj.get_weight("weight")
    weight.data = torch.zeros(weight.shape, dtype=torch.int32)

    draw_weights(model, seed=0)

    assert weight.data.unique().numel() > 1
