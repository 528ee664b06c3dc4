"""Latent attention in either form equals attention with keys and values written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.attention import AttentionBackend, BatchLimits, GraphSupport, LatentSpec
from quire.interfaces.model import LatentOptions
from quire.interfaces.rope import RopeParameters
from quire.layers import latent_attention
from quire.layers.combined_attention import combine
from quire.layers.latent_attention import LatentAttention
from quire.layers.rotary import PairedRotaryTable
from quire.testing.attention_cases import make_batch
from quire.testing.dense_attention import DenseAttention
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.triton.backend import TritonAttention

HEADS, RANK, NOPE, ROPE, VALUE = 6, 20, 8, 4, 10
LIMITS = BatchLimits(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=128)
# Longer than 16 new tokens, in one case with a past: the plain form where it is allowed.
LENGTHS = [(1, 9), (1, 1), (5, 12), (20, 20), (17, 41), (3, 3)]


def make_layer(backend: type[AttentionBackend], plain_from: int | None) -> LatentAttention:
    rotary = PairedRotaryTable.from_parameters(
        RopeParameters(rope_theta=1e3), ROPE, max_len=64, dtype=torch.float32, device="cpu"
    )
    options = LatentOptions(
        layer_index=0,
        num_heads=HEADS,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        scale=0.3,
        rotary=rotary,
        norm_eps=1e-6,
    )
    layer = LatentAttention(options, torch.float32, torch.device("cpu"))
    layer.latent = evolve(layer.latent, plain_from=plain_from)
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    spec = layer.spec(dtype="float32", kv_dtype="float32", block_size=4, device="cpu")
    cache = torch.full((60, 4, RANK + ROPE), float("nan"))
    layer.bind(backend(spec, LIMITS, {}), cache, 0)
    return layer


def make_inputs() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    q = [torch.randn(n, HEADS * (NOPE + ROPE), generator=generator) for _, n in LENGTHS]
    kv = [torch.randn(n, RANK + ROPE, generator=generator) for _, n in LENGTHS]
    return q, kv


def run(layer: LatentAttention, spans: list[tuple[int, int, int]]) -> Tensor:
    """Run one step of (sequence, first, last)."""
    tables, block = [], 1
    for _, length in LENGTHS:
        tables.append(list(range(block, block + -(-length // 4))))
        block += len(tables[-1])
    batch = make_batch([s[1:] for s in spans], [tables[s[0]] for s in spans], 4)
    q, kv = make_inputs()
    backend = layer.backend
    plan = backend.plan(batch, 0)
    backend.prepare(plan)
    batch.plans = [plan]
    parts = [torch.cat([x[i][first:last] for i, first, last in spans]) for x in (q, kv)]
    return layer(*parts, batch)


def steps(layer: LatentAttention) -> Tensor:
    """Write all pasts, then run the step."""
    past = [(i, 0, n - q) for i, (q, n) in enumerate(LENGTHS) if n > q]
    run(layer, sorted(past, key=lambda span: span[2] > 1))
    return run(layer, [(i, n - q, n) for i, (q, n) in enumerate(LENGTHS)])


def exact(layer: LatentAttention) -> Tensor:
    """Return the same with the keys and values of all heads written out, in float64."""
    found = []
    table = layer.rotary
    rotary = PairedRotaryTable(table.cos.double(), table.sin.double(), ROPE, torch.float64)
    weight = layer.kv_b_proj.weight.double()
    for (new, length), q, kv in zip(LENGTHS, *make_inputs(), strict=True):
        at = torch.arange(length)
        latent, own = kv.double().split((RANK, ROPE), -1)
        latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        made = (latent * layer.kv_a_layernorm.weight.double()) @ weight.T
        nope, values = made.unflatten(1, (HEADS, -1)).split((NOPE, VALUE), -1)
        own = rotary.rotate(own[:, None], at).expand(-1, HEADS, -1)
        heads, turned = q.double().unflatten(1, (HEADS, -1)).split((NOPE, ROPE), -1)
        queries = torch.cat((heads, rotary.rotate(turned, at)), -1)[length - new :]
        scores = torch.einsum("qhd,khd->hqk", queries, torch.cat((nope, own), -1)) * 0.3
        scores = scores.masked_fill(at > at[length - new :, None], -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1))
    return torch.cat(found)


BACKENDS = [ReferenceAttention, DenseAttention, TritonAttention]
BACKENDS.append(combine(ReferenceAttention, TritonAttention))


@pytest.mark.parametrize("plain_from", [None, 17, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_forms_are_attention_with_keys_and_values_written_out(
    backend: type[AttentionBackend], plain_from: int | None
) -> None:
    layer = make_layer(backend, plain_from)

    found = steps(layer)

    torch.testing.assert_close(found.double(), exact(layer), rtol=0, atol=2e-5)


def test_long_pasts_are_made_wide_for_some_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(ReferenceAttention, 17)
    layer.backend.limits = evolve(LIMITS, max_num_batched_tokens=30)
    widths, causal = [], latent_attention._causal

    def seen(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        widths.append((len(k), k.shape[1]))
        return causal(q, k, *rest)

    monkeypatch.setattr(latent_attention, "_causal", seen)

    found = steps(layer)

    torch.testing.assert_close(found.double(), exact(layer), rtol=0, atol=2e-5)
    assert widths[-3:] == [(20, 6), (41, 4), (41, 2)]


def test_captured_steps_are_absorbed() -> None:
    sizes = make_layer(ReferenceAttention, 2).latent
    batch = make_batch([(0, 5)], [[1, 2]], 4)

    assert sizes.plain_rows(batch) == [0]
    for support in (GraphSupport.ANY, GraphSupport.SINGLE_TOKEN):
        batch.captured_for = support
        assert sizes.plain_rows(batch) == []


def test_backends_leave_out_what_the_layer_attends_to() -> None:
    layer = make_layer(TritonAttention, 17)
    batch = make_batch([(8, 9), (0, 20), (0, 3)], [[1, 2, 3], [4, 5, 6, 7, 8], [9]], 4)

    plan = layer.backend.plan(batch, 0)

    rows = plan.tiles[1 : 1 + int(plan.tiles[0, 0]), 0].unique().tolist()
    assert rows == [2]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((512, 128, 128), 171), ((16, 8, 6), 16), ((20, 128, 128), 16)],
)
def test_plain_form_begins_where_it_takes_fewer_operations(
    sizes: tuple[int, int, int], expected: int
) -> None:
    rank, nope, value = sizes
    latent = LatentSpec(kv_lora_rank=rank, rope_head_dim=64, nope_head_dim=nope, v_head_dim=value)

    assert latent.fewest_plain_tokens == expected


def test_deterministic_latents_are_refused() -> None:
    from quire.layers.build import LayerBuilder
    from quire.testing.dense_layers import PlainWeights

    build = LayerBuilder(
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=8,
        quantization=PlainWeights({}),
        dense=PlainWeights({}),
        batch_invariant=True,
    )
    with pytest.raises(ConfigError, match="leave --deterministic out"):
        build.latent_attention("x", make_layer(ReferenceAttention, None).options)  # type: ignore[arg-type]
