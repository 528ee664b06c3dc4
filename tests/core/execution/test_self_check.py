"""The self-check passes right backends of any spec, and names what is wrong with the others."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from attrs import evolve
from broken_backends import BROKEN
from broken_latents import FusedLatentGather, LatentGather
from broken_plans import FusedGather
from gather_attention import GatherAttention
from torch import Tensor

from quire.errors import KernelError
from quire.execution.kv_cache import LayerGroup
from quire.execution.self_check import check_attention, foretell, why_skipped
from quire.execution.self_check_case import pieces_of, steps_of
from quire.interfaces.attention import AttentionBackend, BatchLimits, KVLayout
from quire.interfaces.batch import Batch
from quire.interfaces.model import AttentionOptions, LatentOptions
from quire.interfaces.rope import RopeParameters
from quire.layers.attention import Attention
from quire.layers.combined_attention import combine
from quire.layers.dense_attention import dense_attention
from quire.layers.latent_attention import LatentAttention
from quire.layers.rotary import PairedRotaryTable, RotaryTable
from quire.testing.attention_cases import Case, make_inputs, make_spec
from quire.testing.dense import attention
from quire_attention.reference.backend import ReferenceAttention
from quire_attention.sdpa.backend import SdpaAttention

LIMITS = BatchLimits(max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=2048)
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 5},
    "long window": {"sliding_window": 300},
    "window of one": {"sliding_window": 1},
    "window beyond the context": {"sliding_window": 4096},
    "soft cap": {"logit_softcap": 20.0},
    "sinks": {"sinks": True},
    "one KV head": {"num_heads": 8, "num_kv_heads": 1},
    "wide heads": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "scale": 128**-0.5},
    "large scale": {"scale": 1.0},
}


def make_group(backend: type[AttentionBackend], **changes: Any) -> LayerGroup:
    """Return one layer with norm and rotation, served by a backend."""
    dtype, size = changes.pop("dtype", "float32"), changes.pop("block_size", 16)
    limits, kv_dtype = changes.pop("limits", LIMITS), changes.pop("kv_dtype", dtype)
    values = {"layer_index": 0, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "scale": 0.25}
    values |= {"qk_norm": 1e-6, **changes}
    values["rotary"] = RotaryTable.from_parameters(
        RopeParameters(rope_theta=1e4),
        values["head_dim"],
        max_len=limits.max_model_len,
        dtype=getattr(torch, dtype),
        device="cpu",
    )
    layer = Attention(AttentionOptions(**values), getattr(torch, dtype), torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    spec = layer.spec(dtype=dtype, kv_dtype=kv_dtype, block_size=size, device="cpu")
    layer.bind(backend(spec, limits, {}), None, 0)
    return LayerGroup(
        spec=spec,
        layers=[layer],
        backend_name="mine",
        backend_class=backend,
        layout=backend.kv_layout(spec),
    )


def refusal_of(backend: type[AttentionBackend], **changes: Any) -> str:
    with pytest.raises(KernelError) as caught:
        check_attention([make_group(backend, **changes)], LIMITS)
    return str(caught.value)


RIGHT = {
    "gather": GatherAttention,
    "fused": FusedGather,
    "reference": ReferenceAttention,
    "sdpa": SdpaAttention,
    "two": combine(FusedGather, GatherAttention),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", RIGHT)
def test_right_backend_passes(backend: str, spec: str, dtype: str) -> None:
    group = make_group(RIGHT[backend], dtype=dtype, **SPECS[spec])
    if RIGHT[backend].why_unsupported(group.spec) is not None:
        assert backend == "sdpa"
        assert spec in ("soft cap", "sinks")
        return

    check_attention([group], LIMITS)


class OneByOne(GatherAttention):
    """Adds the products of a score one after another, as a kernel's loop does."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        q, total = q.float().transpose(0, 1), torch.zeros(())
        for dim in range(q.shape[-1]):
            total = total + q[..., dim, None] * keys[..., None, :, dim]
        return self.capped(total * self.spec.scale)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("scale", [1.0, 0.0625])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_backend_that_adds_one_by_one_passes_with_wide_heads(
    num_kv_heads: int, scale: float, window: int | None
) -> None:
    heads = {"num_kv_heads": num_kv_heads, "head_dim": 256, "scale": scale}

    check_attention([make_group(OneByOne, **heads, sliding_window=window)], LIMITS)


@pytest.mark.parametrize("size", [1, 2, 64, 4096])
def test_right_backend_passes_with_blocks_of_any_size(size: int) -> None:
    check_attention([make_group(ReferenceAttention, block_size=size)], LIMITS)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_right_backend_passes_with_a_cache_of_another_dtype(kv_dtype: str) -> None:
    check_attention([make_group(ReferenceAttention, kv_dtype=kv_dtype)], LIMITS)


class CausalAllTheSame(ReferenceAttention):
    def _visible(self, distance: Tensor) -> Tensor:
        return distance >= 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("longest", [1, 2, 18, 2048])
def test_backend_of_an_encoder_is_checked_without_a_cache(dtype: str, longest: int) -> None:
    limits = evolve(LIMITS, max_model_len=longest)
    for backend in (ReferenceAttention, SdpaAttention):
        check_attention([make_group(backend, dtype=dtype, causal=False)], limits)
    if longest > 1:
        with pytest.raises(KernelError, match="fails the self-check: it is wrong"):
            check_attention([make_group(CausalAllTheSame, dtype=dtype, causal=False)], limits)


class WithinLimits(FusedGather):
    """Count what is planned."""

    def plan(self, batch: Any, group: int) -> Any:
        limits = self.limits
        assert batch.num_seqs <= limits.max_num_seqs
        assert sum(batch.query_lens) <= limits.max_num_batched_tokens
        assert max(batch.seq_lens_bound) <= limits.max_model_len
        assert batch.query_lens[: batch.num_single_token_seqs].count(1) == batch.query_lens.count(1)
        return super().plan(batch, group)


@pytest.mark.parametrize("change", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 1}])
@pytest.mark.parametrize("longest", [1, 2, 17, 300])
def test_check_keeps_the_limits_of_the_engine(change: dict[str, int], longest: int) -> None:
    limits = evolve(LIMITS, max_model_len=longest, **change)
    group = make_group(WithinLimits, limits=limits, sliding_window=5)

    check_attention([group], limits)


def test_steps_have_single_tokens_and_chunks_around_the_edges() -> None:
    spec = make_spec(block_size=16, sliding_window=64)

    mixed, single, few = steps_of(spec, LIMITS)

    assert [(span.num_tokens, span.last) for span in mixed] == [
        *((1, 1), (1, 16), (1, 17), (1, 55)),
        *((19, 19), (24, 59), (3, 67)),
    ]
    assert {span.num_tokens for span in single} == {1}
    assert [span.num_tokens for span in few] == [1, 3]
    tokens = [
        span
        for piece in pieces_of(mixed, evolve(LIMITS, max_num_batched_tokens=5))
        for span in piece
    ]
    assert sum(span.num_tokens for span in tokens) == sum(span.num_tokens for span in mixed)


WRONG = {
    "scale-squared": ("plain", "wide heads"),
    "scale-missing": ("plain", "one KV head"),
    "heads-by-modulo": ("plain", "wide heads"),
    "window-one-too-long": ("window", "long window"),
    "window-one-too-short": ("window", "long window"),
    "window-ignored": ("window", "long window"),
    "softcap-ignored": ("soft cap",),
    "sinks-ignored": ("sinks",),
    "causal-one-ahead": ("plain",),
    "causal-from-the-top-left": ("plain",),
    "tail-unmasked": ("plain",),
    "blocks-in-a-row": ("plain",),
    "next-row-of-the-table": ("plain",),
    "written-to-the-next-slot": ("plain",),
    "strides-ignored": ("plain",),
    "wrong-for-one-token": ("plain",),
    "wrong-for-several-tokens": ("plain",),
    "fused-write-without-norm": ("plain",),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "spec"), [(name, spec) for name, specs in WRONG.items() for spec in specs]
)
def test_wrong_backend_is_refused_with_its_worst_element(name: str, spec: str, dtype: str) -> None:
    message = refusal_of(BROKEN[name], dtype=dtype, **SPECS[spec])

    assert message.startswith("attention backend 'mine' fails the self-check: it is wrong at seq")
    for word in ("position", "head", "dimension", "got", "expected", "bound", "--skip-self-check"):
        assert word in message


def test_window_at_its_real_length_is_seen_to_be_off_by_one() -> None:
    limits = evolve(LIMITS, max_model_len=8192)
    group = make_group(BROKEN["window-one-too-long"], sliding_window=4096, limits=limits)

    with pytest.raises(KernelError, match=r"sequence 6 of 7 \(3 new tokens after 4096\)"):
        check_attention([group], limits)


class NanInOneHead(GatherAttention):
    def attend(self, layer: Any, q: Tensor, *rest: Any) -> None:
        super().attend(layer, q, *rest)
        rest[4][-1, 2, 3] = float("nan")


def test_nan_is_named_with_its_place() -> None:
    message = refusal_of(NanInOneHead)

    assert "position 58, head 2, dimension 3: got nan (left unwritten, or computed from NaN)" in (
        message
    )
    assert "1 of 188 (token, head) pairs are wrong" in message


class Unwritten(GatherAttention):
    def attend(self, *arguments: Any) -> None:
        return None


def test_output_that_is_never_written_is_named() -> None:
    assert "got nan (left unwritten" in refusal_of(Unwritten)


class ResizesOut(GatherAttention):
    def attend(self, layer: Any, q: Tensor, *rest: Any) -> None:
        rest[4].resize_(len(q), 4, 15)


def test_output_of_another_shape_is_named() -> None:
    message = refusal_of(ResizesOut)

    assert (
        "it made `out` [47, 4, 15] of torch.float32, where [47, 4, 16] of torch.float32" in message
    )


class WrongQ(FusedGather):
    def rotate_and_write(self, *arguments: Any) -> Tensor | None:
        q = super().rotate_and_write(*arguments)
        assert q is not None
        return q.half()


def test_q_of_another_dtype_is_named() -> None:
    assert "it returns q [44, 4, 16] of torch.float16 from rotate_and_write(), where" in refusal_of(
        WrongQ
    )


class RaisesInPlan(GatherAttention):
    def plan(self, batch: Any, group: int) -> Any:
        raise IndexError("list index out of range")


class RaisesInAttend(GatherAttention):
    def attend(self, *arguments: Any) -> None:
        raise ValueError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("backend", "fact"),
    [
        (RaisesInPlan, "raises IndexError in plan() for sequences of new tokens"),
        (RaisesInAttend, "raises ValueError in attend() for sequences of new tokens"),
        (BROKEN["cache-of-the-wrong-shape"], "raises RuntimeError in write() for sequences of"),
    ],
)
def test_backend_that_raises_is_named_with_the_method(
    backend: type[AttentionBackend], fact: str
) -> None:
    message = refusal_of(backend)

    assert message.startswith(f"attention backend 'mine' fails the self-check: it {fact}")
    assert "\n" not in message


class OneOfTwoWrong(GatherAttention):
    """Right in the first group alone."""

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        wrong = self.spec.sliding_window is not None
        return super().scores(q, keys) * (2 if wrong else 1)


def test_every_group_is_checked() -> None:
    groups = [make_group(OneOfTwoWrong), make_group(OneOfTwoWrong, sliding_window=7)]

    check_attention(groups[:1], LIMITS)
    with pytest.raises(KernelError, match="blocks of 16, window 7"):
        check_attention(groups, LIMITS)


class Slow(GatherAttention):
    """Takes long where it attends."""

    def attend(self, *tensors: Any, **more: Any) -> None:
        time.sleep(0.2)
        super().attend(*tensors, **more)


def test_backend_that_takes_long_is_named_with_the_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quire.patience.PATIENCE_S", 0.05)

    check_attention([make_group(Slow)], LIMITS)

    [line] = capsys.readouterr().err.splitlines()
    start = "quire: still waiting for the self-check of attention backend 'mine', in attend() for "
    assert line.startswith(f"{start}sequences of new tokens 1 after 0,")
    assert "--skip-self-check starts without it after 0.05 s" in line


class FirstGroupAlways(GatherAttention):
    """Right where all layers are alike."""

    def plan(self, batch: Batch, group: int) -> Any:
        return super().plan(batch, 0)


def test_backend_that_reads_another_group_is_refused() -> None:
    groups = [make_group(FirstGroupAlways), make_group(FirstGroupAlways, sliding_window=7)]

    check_attention(groups[:1], LIMITS)
    with pytest.raises(KernelError, match="fails the self-check: it is wrong"):
        check_attention(groups, LIMITS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_dtype": "int8"}, "int8 KV cache"),
    ],
)
def test_what_is_not_checked_is_told(change: dict[str, Any], reason: str) -> None:
    group = make_group(GatherAttention)
    group.spec = evolve(group.spec, **change)

    assert reason in (why_skipped(group.spec) or "")
    assert reason in foretell([group], skip=False)[0]
    check_attention([group], LIMITS)


def make_latent_group(backend: type[AttentionBackend]) -> LayerGroup:
    """Return one layer of latent attention."""
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.3])
    table = PairedRotaryTable(angles.cos(), angles.sin(), 4, torch.float32)
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    options = LatentOptions(
        **{"layer_index": 0, "num_heads": 20, **sizes, "scale": 0.3, "norm_eps": 1e-6},
        rotary=table,
    )
    layer = LatentAttention(options, torch.float32, torch.device("cpu"))
    for parameter in layer.parameters():
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        )
    spec = layer.spec(dtype="float32", kv_dtype="float32", block_size=16, device="cpu")
    layer.bind(backend(spec, LIMITS, {}), None, 0)
    return LayerGroup(
        spec=spec,
        layers=[layer],
        backend_name="mine",
        backend_class=backend,
        layout=backend.kv_layout(spec),
    )


@pytest.mark.parametrize("backend", [LatentGather, FusedLatentGather, ReferenceAttention])
def test_right_backend_of_latents_passes(backend: type[AttentionBackend]) -> None:
    check_attention([make_latent_group(backend)], LIMITS)


WRONG_LATENTS = [name for name in BROKEN if name.startswith("latent-")]
WRONG_LATENTS.remove("latent-in-a-layout-of-its-own")


@pytest.mark.parametrize("name", WRONG_LATENTS)
def test_wrong_backend_of_latents_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match="fails the self-check: it (is wrong|gives)"):
        check_attention([make_latent_group(BROKEN[name])], LIMITS)


def test_what_is_checked_is_told() -> None:
    groups = [make_group(GatherAttention), make_group(GatherAttention, sliding_window=7)]

    assert foretell(groups, skip=False) == [
        "attention mine (1 layer): against float64 at the start",
        "attention mine (1 layer, window 7): against float64 at the start",
    ]
    assert foretell(groups[:1], skip=True) == [
        "attention mine (1 layer): skipped: --skip-self-check"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_heads": 6},
        {"sliding_window": 5, "value_head_dim": 8},
        {"logit_softcap": 2.0, "sinks": True},
        {"alibi": True},
        {"causal": False},
    ],
)
def test_formula_is_that_of_the_kit(changes: dict[str, Any]) -> None:
    case = Case(spec=make_spec(**changes), lengths=((1, 20), (7, 30), (9, 9)))
    inputs = make_inputs(case)

    found = [
        dense_attention(
            case.spec, *heads, dtype=torch.float64, sinks=inputs.sinks, alibi_slopes=inputs.alibi
        )
        for heads in zip(inputs.q, inputs.k, inputs.v, strict=True)
    ]

    for mine, theirs in zip(found, attention(case, inputs, torch.float64), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_layout_is_read_from_the_group() -> None:
    """A cache of another dtype than the model's is made as the backend asked."""
    seen = []

    class Watching(ReferenceAttention):
        @classmethod
        def kv_layout(cls, spec: Any) -> KVLayout:
            return evolve(super().kv_layout(spec), dtype="float16")

        def write(self, layer: Any, k: Tensor, v: Tensor, kv_cache: Tensor, plan: Any) -> None:
            seen.append(kv_cache.dtype)
            super().write(layer, k, v, kv_cache, plan)

    check_attention([make_group(Watching, kv_dtype="float16")], LIMITS)

    assert set(seen) == {torch.float16}
