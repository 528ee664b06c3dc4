"""Unquantized layers: the product, the look-up, and what packing must not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.errors import PluginError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsMethod,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
)
from quire.layers.embedding import Embedding, Head
from quire.layers.experts import Experts
from quire.layers.linear import Linear
from quire.layers.places import places_of_layer
from quire.testing import QuantizationMethodTests
from quire_kernels import mixtures
from quire_quant.none.method import NoQuantization

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
METHOD = NoQuantization({})


class TestNone(QuantizationMethodTests):
    method = NoQuantization


def linear_spec(dtype: str, *, sizes: tuple[int, ...] = (24, 8), bias: bool = True) -> LinearSpec:
    return LinearSpec(
        name="a.qkv_proj",
        parts=tuple(f"p{i}" for i in range(len(sizes))),
        in_features=48,
        output_sizes=sizes,
        bias=bias,
        dtype=dtype,
        device="cpu",
    )


def embedding_spec(dtype: str, *, is_head: bool) -> EmbeddingSpec:
    return EmbeddingSpec(
        name="head" if is_head else "embed",
        num_embeddings=40,
        embedding_dim=48,
        is_head=is_head,
        dtype=dtype,
        device="cpu",
    )


def fill(weight: Tensor, seed: int) -> Tensor:
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.data.copy_(values)
    return weight.data.clone()


def check_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Fail unless the error is at most twice plain PyTorch's, plus one rounding unit."""
    exact = x.double() @ weight.double().T
    plain = x @ weight.T
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += torch.finfo(x.dtype).eps * exact.abs().max()
    assert out.dtype is x.dtype
    assert (out.double() - exact).abs().max() <= allowed


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
def test_linear_is_the_product_before_and_after_packing(
    dtype: str, bias: bool, num_tokens: int
) -> None:
    spec = linear_spec(dtype, bias=bias)
    layer = Linear(spec, METHOD.method_for(spec))
    weight = fill(layer.get_weight("weight"), 0)
    given_bias = fill(layer.bias, 1) if bias else None
    x = torch.randn(num_tokens, 48).to(getattr(torch, dtype))

    check_product(layer(x), x, weight, given_bias)
    layer.finish_loading()
    check_product(layer(x), x, weight, given_bias)


@DTYPES
def test_packed_linear_takes_rows_that_lie_apart(dtype: str) -> None:
    spec = linear_spec(dtype)
    layer = Linear(spec, METHOD.method_for(spec))
    weight, bias = fill(layer.get_weight("weight"), 0), fill(layer.bias, 1)
    layer.finish_loading()
    wide = torch.randn(5, 96).to(getattr(torch, dtype))

    check_product(layer(wide[:, 48:]), wide[:, 48:], weight, bias)
    check_product(layer(wide[::2, :48]), wide[::2, :48], weight, bias)


@pytest.mark.parametrize(
    ("dtype", "question"),
    [("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")],
)
def test_weights_stay_plain_where_onednn_lacks_the_dtype(
    dtype: str, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = linear_spec(dtype)
    layer = Linear(spec, METHOD.method_for(spec))
    weight, bias = fill(layer.get_weight("weight"), 0), fill(layer.bias, 1)
    monkeypatch.setattr(torch.ops.mkldnn, question, lambda: False)

    layer.finish_loading()

    x = torch.randn(2, 48).to(getattr(torch, dtype))
    assert layer.get_weight("weight") is not None
    check_product(layer(x), x, weight, bias)


def test_packing_frees_the_plain_weight() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not pack bfloat16")
    spec = linear_spec("bfloat16", bias=False)
    layer = Linear(spec, METHOD.method_for(spec))

    layer.finish_loading()

    assert list(layer.parameters()) == []
    with pytest.raises(PluginError, match=r"'a\.qkv_proj' has no weight 'weight'"):
        layer.get_weight("weight")


@DTYPES
def test_embedding_returns_rows_by_token_id(dtype: str) -> None:
    spec = embedding_spec(dtype, is_head=False)
    layer = Embedding(spec, METHOD.method_for(spec))
    weight = fill(layer.get_weight("weight"), 0)
    layer.finish_loading()

    out = layer(torch.tensor([3, 39, 0], dtype=torch.int32))

    assert torch.equal(out, weight[[3, 39, 0]])


@DTYPES
@pytest.mark.parametrize("is_tied", [True, False])
def test_head_gives_logits_and_a_tied_one_leaves_look_ups_alone(dtype: str, is_tied: bool) -> None:
    embedding_own = embedding_spec(dtype, is_head=False)
    embedding = Embedding(embedding_own, METHOD.method_for(embedding_own))
    spec = embedding_spec(dtype, is_head=True)
    head = Head(spec, METHOD.method_for(spec), embedding if is_tied else None)
    weight = fill(embedding.get_weight("weight"), 0)
    if not is_tied:
        weight = fill(head.get_weight("weight"), 1)
    hidden = torch.randn(3, 48).to(getattr(torch, dtype))

    embedding.finish_loading()
    head.finish_loading()

    check_product(head(hidden), hidden, weight, None)
    assert embedding(torch.tensor([1])).shape == (1, 48)
    assert len(list(head.parameters())) <= (0 if is_tied else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_filled_by_part_and_weighed(dtype: str) -> None:
    spec = ExpertsSpec(
        name="mlp.experts",
        num_experts=3,
        hidden_size=8,
        intermediate_size=5,
        dtype=dtype,
        device="cpu",
        top_k=2,
        parts=("w1", "w3", "w2"),
    )
    assert METHOD.why_unsupported(spec) is None
    method = METHOD.method_for(spec)
    assert isinstance(method, ExpertsMethod)
    layer = Experts(spec, method)
    generator = torch.Generator().manual_seed(2)
    weights, wanted = {}, getattr(torch, dtype)
    for name, place in places_of_layer(layer):
        weights[name] = torch.randn(place.view().shape, generator=generator).to(
            getattr(torch, dtype)
        )
        place.view().copy_(weights[name])
    assert sorted(weights) == [
        f"mlp.experts.{i}.{part}.weight" for i in range(3) for part in ("w1", "w2", "w3")
    ]
    layer.finish_loading()
    assert len(list(layer.parameters())) in (0, 2)
    x = torch.randn(4, 8, generator=generator).to(wanted)
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [2, 1]])
    shares = torch.rand(4, 2, generator=generator)

    found = layer(x, shares, ids)

    assert found.dtype == x.dtype
    for row in range(4):
        exact = torch.zeros(8, dtype=torch.float64)
        for share, expert in zip(shares[row], ids[row].tolist(), strict=True):
            gate, up, down = (
                weights[f"mlp.experts.{expert}.{part}.weight"].double()
                for part in ("w1", "w3", "w2")
            )
            wide = x[row].double()
            exact += share * (down @ (torch.nn.functional.silu(gate @ wide) * (up @ wide)))
        unit = torch.finfo(x.dtype).eps
        assert (found[row] - exact).abs().max() <= 8 * unit * exact.abs().max()


def test_experts_on_a_gpu_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "kernels", lambda name: None)
    spec = ExpertsSpec(
        name="e",
        num_experts=2,
        hidden_size=4,
        intermediate_size=4,
        dtype="float32",
        device="cuda:0",
    )
    assert "Triton" in (METHOD.why_unsupported(spec) or "")


def test_only_layers_with_weights_are_served() -> None:
    cache = KVCacheSpec(name="c", num_kv_heads=1, head_dim=4, kv_dtype="float32")

    assert METHOD.why_unsupported(linear_spec("float32")) is None
    assert METHOD.why_unsupported(embedding_spec("float32", is_head=True)) is None
    assert "KVCacheSpec" in (METHOD.why_unsupported(cache) or "")
    assert METHOD.method_for(cache) is None
