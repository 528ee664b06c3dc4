"""The attention layer hands its backend normalised, rotated heads, fused or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.interfaces.attention import AttentionBackend, AttentionSpec, GraphSupport, KVLayout
from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions
from quire.interfaces.rope import RopeParameters
from quire.layers.attention import Attention
from quire.layers.rotary import RotaryTable

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, 8, 5


class Recorder(AttentionBackend):
    """Keep what it is given; the output is q, so that it can be told apart."""

    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        return None

    @classmethod
    def kv_layout(cls, spec: AttentionSpec) -> KVLayout:
        return KVLayout(name="none", block_shape=(1,), dtype="float32")

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def plan(self, batch: Batch, group: int) -> Any:
        return None

    def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Any) -> None:
        self.calls.append(("write", (k.clone(), v.clone(), plan)))

    def attend(
        self,
        layer: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: Tensor | None,
        plan: Any,
        out: Tensor,
        lse: Tensor | None = None,
    ) -> None:
        out.copy_(q)
        self.calls.append(("attend", (q.clone(), k.clone(), v.clone(), plan)))


class Fused(Recorder):
    """Offer the fused form."""

    def rotate_and_write(self, layer: Any, qkv: Tensor, *rest: Any) -> Tensor | None:
        self.calls.append(("fused", rest))
        return torch.full((len(qkv), HEADS, HEAD_DIM), 7.0)


class Declining(Recorder):
    """Have a fused form, but not for this layer."""

    def rotate_and_write(self, layer: Any, qkv: Tensor, *rest: Any) -> Tensor | None:
        return None


class Step:
    """What the layer reads of a batch."""

    positions = torch.tensor([0, 1, 2, 9, 10], dtype=torch.int32)
    plans = ("plan of group 0", "plan of group 1")
    captured_for = GraphSupport.NONE


def make_layer(backend: AttentionBackend, **changes: Any) -> Attention:
    values = {
        "layer_index": 3,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "scale": 0.5,
    }
    cached = changes.pop("cached", True)
    layer = Attention(AttentionOptions(**{**values, **changes}), torch.float32, torch.device("cpu"))
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    layer.bind(backend, torch.zeros(1) if cached else None, 1)
    return layer


def rotary() -> RotaryTable:
    return RotaryTable.from_parameters(
        RopeParameters(), HEAD_DIM, max_len=16, dtype=torch.float32, device="cpu"
    )


def draw_qkv() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)


@pytest.mark.parametrize("with_rotary", [True, False])
@pytest.mark.parametrize("qk_norm", [None, 1e-6])
@pytest.mark.parametrize("kind", [Recorder, Declining])
def test_heads_are_normalised_then_rotated_and_values_left_alone(
    with_rotary: bool, qk_norm: float | None, kind: type[Recorder]
) -> None:
    backend, table = kind(), rotary() if with_rotary else None
    layer = make_layer(backend, rotary=table, qk_norm=qk_norm)
    qkv = draw_qkv()
    q, k, v = qkv.clone().view(TOKENS, -1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    if qk_norm is not None:
        q, k = (
            x / (x.pow(2).mean(-1, keepdim=True) + qk_norm).sqrt() * weight
            for x, weight in ((q, layer.q_norm.weight), (k, layer.k_norm.weight))
        )
    if table is not None:
        q, k = table.rotate(q, Step.positions), table.rotate(k, Step.positions)

    out = layer(qkv, Step())

    (first, written), (second, attended) = backend.calls
    assert (first, second) == ("write", "attend")
    for found, want in zip((*written[:2], *attended[:3]), (k, v, q, k, v), strict=True):
        torch.testing.assert_close(found, want)
    assert written[2] == attended[3] == "plan of group 1"
    torch.testing.assert_close(out, q.reshape(TOKENS, -1))


def test_fused_form_takes_the_place_of_norm_rotation_and_write() -> None:
    backend, table = Fused(), rotary()
    layer = make_layer(backend, rotary=table, qk_norm=1e-6)

    out = layer(draw_qkv(), Step())

    (first, rest), (second, attended) = backend.calls
    assert (first, second) == ("fused", "attend")
    positions, given_table, norm, kv_cache, plan = rest
    assert positions is Step.positions
    assert given_table is table
    assert kv_cache is layer.kv_cache
    assert plan == "plan of group 1"
    assert torch.equal(norm.q, layer.q_norm.weight)
    assert torch.equal(norm.k, layer.k_norm.weight)
    assert norm.eps == 1e-6
    assert attended[0].eq(7).all()
    assert out.eq(7).all()


@pytest.mark.parametrize("kind", [Recorder, Fused])
def test_layer_without_a_cache_writes_nothing(kind: type[Recorder]) -> None:
    backend = kind()
    layer = make_layer(backend, cached=False, causal=False)

    layer(draw_qkv(), Step())

    assert [name for name, _ in backend.calls] == ["attend"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"sliding_window": 6}, {"sliding_window": 6}),
        ({"logit_softcap": 30.0}, {"logit_softcap": 30.0}),
        ({"sinks": True}, {"sinks": True}),
        ({"causal": False}, {"causal": False, "kv_dtype": "bfloat16"}),
        ({"scale": 0.25}, {"scale": 0.25}),
    ],
)
def test_spec_says_what_the_model_asks_for(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    layer = make_layer(Recorder(), **changes)

    spec = layer.spec(dtype="bfloat16", kv_dtype="float16", block_size=8, device="cpu")

    assert spec == AttentionSpec(
        **{
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "value_head_dim": HEAD_DIM,
            "scale": 0.5,
            "dtype": "bfloat16",
            "kv_dtype": "float16",
            "block_size": 8,
            "device": "cpu",
            **expected,
        }
    )
    assert layer.index == 3
    assert (layer.sinks is not None) == spec.sinks
