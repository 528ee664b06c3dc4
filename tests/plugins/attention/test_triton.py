"""The kernels of `triton` on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.errors import KernelError
from quire.interfaces.attention import AttentionSpec, GraphSupport, LatentSpec
from quire.interfaces.batch import Batch
from quire.layers.attention import QKNorm
from quire.layers.rotary import RotaryTable
from quire.testing.attention_cases import (
    LIMITS,
    Case,
    Layer,
    make_batch,
    make_inputs,
    make_spec,
)
from quire.testing.attention_checks import check_mixed_graph
from quire.testing.attention_run import Subject, run
from quire.testing.attention_strategies import batches
from quire.testing.dense import attention, check_within_bound, log_sums
from quire.testing.graph_steps import GraphStep
from quire.testing.mixed_graph_steps import MixedGraphStep
from quire_attention.triton.backend import UNSORTED_ROWS, TritonAttention, TritonPlan
from quire_attention.triton.tuning import Tile, fitted, tuning_for

# On a CPU they run in Triton's interpreter.
GPU = "cuda" if torch.cuda.is_available() else "cpu"


class Crowd(TritonAttention):
    """Serve all sequences with one token as those that fill the GPU several times."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.set_tuning(attrs.evolve(self.tuning, crowd_per_sm=0, most_per_sm=64, chunk=16))


class ManySplits(TritonAttention):
    """Cut sequences with one token as finely as the kernels allow."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        single = attrs.evolve(self.tuning.single, block_n=16)
        fine = attrs.evolve(self.tuning, single=single, most_per_sm=64, chunk=16)
        self.set_tuning(fine)


class SmallTiles(TritonAttention):
    """Cut sequences with several tokens into many tiles."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        tile = Tile(block_m=16, block_n=16, num_warps=4, num_stages=2)
        self.set_tuning(attrs.evolve(self.tuning, few=tile, many=tile))


# A kernel is compiled for each, so on a GPU they are few: between them they have every dtype,
# group sizes 1 to 8, heads of 16 to 256, blocks smaller and larger than a tile of keys, windows,
# soft caps and sinks.
SPECS = {
    "plain": {},
    "one-head-a-group": {"num_heads": 3, "num_kv_heads": 3, "dtype": "float16", "block_size": 1},
    "odd-dims": {"head_dim": 20, "value_head_dim": 24, "scale": 0.5, "block_size": 2},
    "group-of-8": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "dtype": "bfloat16"},
    "window": {"sliding_window": 9, "dtype": "float16", "block_size": 8, "head_dim": 32},
    "window-of-1": {"sliding_window": 1, "num_heads": 6, "num_kv_heads": 1, "block_size": 16},
    "window-and-sinks": {
        **{"sliding_window": 20, "sinks": True, "dtype": "bfloat16", "block_size": 32},
        **{"num_heads": 7, "num_kv_heads": 1, "head_dim": 80, "value_head_dim": 80},
    },
    "soft-cap-and-sinks": {
        **{"logit_softcap": 3.0, "sinks": True, "num_heads": 6, "num_kv_heads": 2},
        **{"head_dim": 96, "value_head_dim": 96, "scale": 0.1},
    },
    "soft-cap": {"logit_softcap": 50.0, "num_heads": 5, "num_kv_heads": 1, "dtype": "float16"},
    "large-blocks": {"block_size": 128, "dtype": "bfloat16", "head_dim": 128},
    "wide-heads": {
        **{"head_dim": 256, "value_head_dim": 256, "scale": 0.06, "block_size": 16},
        **{"dtype": "bfloat16", "sliding_window": 40},
    },
    "alibi": {"alibi": True, "num_heads": 6, "num_kv_heads": 2, "block_size": 8},
    "alibi-window-soft-cap": {
        **{"alibi": True, "sliding_window": 20, "logit_softcap": 3.0, "sinks": True},
        **{"dtype": "bfloat16", "head_dim": 32, "num_heads": 5, "num_kv_heads": 1},
    },
    "fp8": {"kv_dtype": "float8_e4m3fn", "dtype": "bfloat16", "head_dim": 64, "block_size": 16},
    "fp8-odd-dims": {
        **{"kv_dtype": "float8_e4m3fn", "head_dim": 20, "value_head_dim": 24, "block_size": 2},
        **{"logit_softcap": 3.0, "sinks": True, "num_heads": 6, "num_kv_heads": 3},
    },
    "fp8-narrow-values": {
        **{"kv_dtype": "float8_e5m2", "head_dim": 20, "value_head_dim": 8, "block_size": 2},
        **{"dtype": "float16", "num_heads": 2, "num_kv_heads": 2},
    },
    "latents": {
        **{"num_heads": 4, "num_kv_heads": 1, "head_dim": 22, "value_head_dim": 16},
        "latent": LatentSpec(kv_lora_rank=16, rope_head_dim=6, nope_head_dim=8, v_head_dim=8),
    },
    "latents-and-more": {
        **{"num_heads": 3, "num_kv_heads": 1, "head_dim": 80, "value_head_dim": 64},
        **{"sinks": True, "sliding_window": 9, "logit_softcap": 3.0, "dtype": "bfloat16"},
        "latent": LatentSpec(kv_lora_rank=64, rope_head_dim=16, nope_head_dim=8, v_head_dim=8),
    },
    "fp8-e5m2": {
        **{"kv_dtype": "float8_e5m2", "dtype": "float16", "sliding_window": 20},
        **{"num_heads": 7, "num_kv_heads": 1, "block_size": 32},
    },
}
EACH_SPEC = pytest.mark.parametrize("name", SPECS)
CUTS = pytest.mark.parametrize("backend", [TritonAttention, ManySplits, SmallTiles, Crowd])
# Rounding is a matter of luck, so the examples are always the same ones: never a rerun.
# Nor are they made smaller: in the interpreter that takes minutes.
WHOLE = (Phase.explicit, Phase.generate)
FEW = settings(max_examples=2, deadline=None, derandomize=True, phases=WHOLE)


def spec_named(name: str) -> AttentionSpec:
    return make_spec(device=GPU, **SPECS[name])


@EACH_SPEC
@CUTS
@given(batches(), st.integers(0, 999))
@FEW
def test_output_is_within_the_bound_and_no_hidden_slot_is_read(
    backend: type[TritonAttention], name: str, lengths: tuple[tuple[int, int], ...], seed: int
) -> None:
    case = Case(spec=spec_named(name), lengths=lengths, seed=seed)
    assert backend.why_unsupported(case.spec) is None
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(backend, case, inputs).out)


def test_latents_of_more_heads_than_a_program_has_room_for() -> None:
    spec = attrs.evolve(spec_named("latents"), num_heads=34)
    case = Case(spec=spec, lengths=((1, 9), (3, 5)))
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(TritonAttention, case, inputs).out)


@given(batches(), st.sampled_from([1, 4, 16]), st.integers(0, 999))
@settings(max_examples=8, deadline=None, phases=WHOLE)
def test_only_the_slots_of_the_step_are_written(
    lengths: tuple[tuple[int, int], ...], size: int, seed: int
) -> None:
    case = Case(spec=make_spec(block_size=size, device=GPU), lengths=lengths, seed=seed)

    done = run(TritonAttention, case, make_inputs(case))

    changed = done.after.view(torch.int32) != done.before.view(torch.int32)
    tokens = changed.any(dim=-1).any(dim=1).flatten().nonzero().flatten()
    assert tokens.tolist() == done.slots.sort().values.tolist()


@pytest.mark.parametrize("sinks", [False, True])
@CUTS
def test_lse_is_the_log_sum_exp_of_the_scores(backend: type[TritonAttention], sinks: bool) -> None:
    case = Case(spec=make_spec(sinks=sinks, device=GPU), lengths=((1, 70), (1, 3), (5, 40)))
    inputs = make_inputs(case)

    done = run(backend, case, inputs, wants_lse=True)

    want = torch.cat(log_sums(case, inputs, torch.float64))
    torch.testing.assert_close(done.lse.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", [TritonAttention, ManySplits])
def test_graph_serves_other_lengths_and_its_padding_rows_are_zero(
    backend: type[TritonAttention], sinks: bool
) -> None:
    spec = make_spec(sinks=sinks, device=GPU)
    case = Case(spec=spec, lengths=((1, 70), (1, 33), (1, 60)), padding=5)
    graph = GraphStep(Subject(backend=backend), case, make_inputs(case))

    for lengths in ([70, 33, 60], [60, 7, 1]):
        cut = graph.load(lengths)
        out = graph.replay().cpu()
        check_within_bound(cut, graph.inputs_of(cut), list(out[:3].split(1)))
        assert out[3:].eq(0).all()


def test_plan_of_a_graph_does_not_depend_on_lengths() -> None:
    assert TritonAttention.graph_support is GraphSupport.ANY
    case = Case(spec=make_spec(device=GPU), lengths=((1, 70), (1, 33)), padding=1)
    graph = GraphStep(Subject(backend=ManySplits), case, make_inputs(case))
    empty = attrs.astuple(graph.backend.plan(graph.batch, 0), recurse=False)

    graph.load([70, 33])
    loaded = attrs.astuple(graph.backend.plan(graph.batch, 0), recurse=False)

    assert all(one is other for one, other in zip(empty, loaded, strict=True))


@pytest.mark.parametrize("backend", [TritonAttention, ManySplits, SmallTiles, Crowd])
def test_graph_of_any_step_serves_other_batches(backend: type[TritonAttention]) -> None:
    lengths = ((1, 70), (1, 33), (1, 1), (2, 2), (7, 60), (20, 20), (40, 90))
    case = Case(spec=make_spec(device=GPU), lengths=lengths)
    graph = MixedGraphStep(Subject(backend=backend), case, make_inputs(case))

    for chosen in ([0, 1, 2, 3, 4, 5, 6], [1, 4], [5], [0, 2], [0, 1, 2, 6, 3]):
        part, inputs = graph.load(chosen)
        out = graph.replay().cpu()
        lens = [query_len for query_len, _ in part.lengths]
        check_within_bound(part, inputs, list(out[: sum(lens)].split(lens)))
        assert out[sum(lens) :].isnan().all()


class StaleTiles(TritonAttention):
    """Keep the tiles of the first captured batch."""

    def plan(self, batch: Batch, group: int) -> TritonPlan:
        if batch.captured_for is GraphSupport.ANY and batch.query_lens:
            batch = attrs.evolve(batch, query_lens=[], seq_lens_bound=[], num_single_token_seqs=0)
        return super().plan(batch, group)


def test_kit_catches_tiles_of_another_batch() -> None:
    case = Case(spec=make_spec(device=GPU), lengths=((1, 7), (9, 9)))

    failure = check_mixed_graph(Subject(backend=StaleTiles), case)

    assert failure is not None
    assert "stale" in failure.guess
    assert check_mixed_graph(Subject(backend=TritonAttention), case) is None


def test_plan_of_any_step_does_not_depend_on_the_batch() -> None:
    case = Case(spec=make_spec(device=GPU), lengths=((1, 70), (7, 33), (9, 9)))
    graph = MixedGraphStep(Subject(backend=TritonAttention), case, make_inputs(case))
    first = attrs.asdict(graph.backend.plan(graph.batch, 0), recurse=False)

    graph.load([0, 2])
    second = attrs.asdict(graph.backend.plan(graph.batch, 0), recurse=False)

    for name, value in first.items():
        other = second[name]
        same = isinstance(value, Tensor) and value.data_ptr() == other.data_ptr()
        assert same and value.shape == other.shape if isinstance(value, Tensor) else value == other


@given(st.lists(st.integers(0, 300), min_size=1, max_size=16), st.sampled_from([None, 40]))
@settings(max_examples=15, deadline=None, phases=WHOLE)
def test_split_plan_covers_every_visible_key_once(lengths: list[int], window: int | None) -> None:
    backend = ManySplits(make_spec(sliding_window=window, device=GPU), LIMITS, {})
    batch = make_batch([(0, 1)] * len(lengths), [[1]] * len(lengths), 4, device=GPU)
    batch = attrs.evolve(batch, seq_lens=torch.tensor(lengths, dtype=torch.int32, device=GPU))

    backend.prepare(backend.plan(batch, 0))

    firsts = backend._first_items[: len(lengths) + 1].tolist()
    count = backend._num_items.item()
    assert (firsts[0], firsts[-1]) == (0, count)
    assert count <= backend.max_items(len(lengths))
    launched = backend._items[:count].tolist()
    if len(lengths) > UNSORTED_ROWS:
        rows = dict.fromkeys(item[0] for item in launched)
        largest = [max(i[2] - i[1] for i in launched if i[0] == row) for row in rows]
        assert sorted(largest, reverse=True) == largest
    items = sorted(launched, key=lambda item: item[4])
    assert [item[4] for item in items] == list(range(count))
    for row, seq_len in enumerate(lengths):
        own = items[firsts[row] : firsts[row + 1]]
        first = 0 if window is None else max(0, seq_len - window) // 16 * 16
        assert [item[0] for item in own] == [row] * len(own)
        assert [item[1] for item in own] == [first, *(item[2] for item in own[:-1])]
        assert own[-1][2] == seq_len
        assert {item[3] for item in own} == {len(own)}


def test_tiles_of_the_longest_context_come_first() -> None:
    backend = SmallTiles(make_spec(device=GPU), LIMITS, {})
    spans = [(5, 6), (0, 20), (30, 35)]
    batch = make_batch(spans, [[1] * 9] * 3, 4, device=GPU)

    plan = backend.plan(batch, 0)

    # 8 tokens a tile: 2 heads a group, 16 rows; their number comes first.
    assert (plan.num_single, plan.most_tiles) == (1, 4)
    assert plan.tiles[:5].tolist() == [[4, 0], [2, 0], [1, 16], [1, 8], [1, 0]]


def test_tiles_of_steps_in_flight_lie_apart() -> None:
    backend = SmallTiles(make_spec(device=GPU), LIMITS, {})
    batch = make_batch([(0, 20)], [[1] * 9], 4, device=GPU)
    slots = range(LIMITS.max_steps_in_flight + 1)

    plans = [backend.plan(attrs.evolve(batch, in_flight_slot=slot), 0) for slot in slots]

    assert len({plan.tiles.data_ptr() for plan in plans}) == len(plans)
    assert all(plan.tiles.tolist() == plans[0].tiles.tolist() for plan in plans)


def test_fused_write_equals_its_three_steps() -> None:
    spec = make_spec(dtype="bfloat16", device=GPU)
    backend = TritonAttention(spec, LIMITS, {})
    batch = make_batch([(6, 7), (0, 5)], [[3, 1], [4, 2]], 4, device=GPU)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(6, 8 * 16, generator=generator).to(GPU, torch.bfloat16)
    weights = torch.randn(2, 16, generator=generator).to(GPU, torch.bfloat16)
    angles = torch.rand(9, 4, generator=generator).to(GPU)
    norm = QKNorm(weights[0], weights[1], 1e-6, (4, 2))
    rotary = RotaryTable(angles.cos(), angles.sin(), 16, torch.bfloat16)
    caches = torch.zeros(2, 5, *backend.kv_layout(spec).block_shape, dtype=qkv.dtype, device=GPU)
    plan = backend.plan(batch, 0)
    heads = qkv.clone().view(6, 8, 16)
    qk = rotary.rotate(norm.normalise(heads[:, :6]), batch.positions)
    backend.write(Layer(), qk[:, 4:], heads[:, 6:], caches[0], plan)

    q = backend.rotate_and_write(Layer(), qkv, batch.positions, rotary, norm, caches[1], plan)

    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(q, qk[:, :4], rtol=2 * unit, atol=unit)
    torch.testing.assert_close(caches[1], caches[0], rtol=2 * unit, atol=unit)


@pytest.mark.parametrize("shared_bytes", [232448, 166912, 101376, 49152])
@pytest.mark.parametrize(("dim", "itemsize"), [(64, 2), (128, 2), (256, 2), (128, 4), (256, 4)])
def test_tiles_fit_the_shared_memory_of_the_gpu(dim: int, itemsize: int, shared_bytes: int) -> None:
    wanted = tuning_for(group=4, dim=dim, itemsize=itemsize)

    found = fitted(wanted, dim=dim, itemsize=itemsize, shared_bytes=shared_bytes)

    for name in ("single", "crowd", "few", "many"):
        tile = getattr(found, name)
        held = dim * itemsize * (tile.block_m + 2 * tile.block_n * tile.num_stages)
        assert held <= shared_bytes or (tile.block_n, tile.num_stages) == (16, 1)
        assert tile.block_m == getattr(wanted, name).block_m
    if shared_bytes == 232448 and dim < 256:
        assert found == wanted


def test_fused_write_is_not_offered_for_values_of_another_width() -> None:
    backend = TritonAttention(make_spec(value_head_dim=8, device=GPU), LIMITS, {})

    assert backend.rotate_and_write(Layer(), *[None] * 6) is None


@pytest.mark.parametrize("name", ["plain", "latents"])
def test_buffers_are_counted_in_the_workspace(name: str) -> None:
    spec = spec_named(name)
    backend = TritonAttention(spec, LIMITS, {})
    buffers = [x for x in vars(backend).values() if isinstance(x, Tensor)]

    held = sum(x.nbytes for x in [*buffers, backend._tiles._lists])

    assert held <= TritonAttention.workspace_bytes(spec, LIMITS)


def test_attention_without_a_cache_is_refused() -> None:
    backend = TritonAttention(make_spec(device=GPU), LIMITS, {})
    q = torch.zeros(1, 4, 16, device=GPU)

    with pytest.raises(KernelError, match="needs a KV cache"):
        backend.attend(Layer(), q, q, q, None, None, q)


WIDE = LatentSpec(kv_lora_rank=640, rope_head_dim=64, nope_head_dim=8, v_head_dim=8)
REFUSED = {
    "latents beyond 512": {
        **{"num_kv_heads": 1, "head_dim": 704, "value_head_dim": 640, "latent": WIDE},
    },
    "ALiBi with latents": {"alibi": True, "latent": WIDE},
    "bidirectional attention": {"causal": False},
    "KV cache in another dtype": {"kv_dtype": "float16"},
    "heads beyond 256": {"head_dim": 320},
    "block size of 12": {"block_size": 12},
    "scale of zero": {"scale": 0.0},
    "float64": {"dtype": "float64"},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED.keys())
def test_triton_says_what_it_cannot_do(words: str, change: dict[str, object]) -> None:
    reason = TritonAttention.why_unsupported(make_spec(**change))

    assert reason is not None
    assert words in reason


def test_triton_refuses_a_cpu_without_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)

    assert "TRITON_INTERPRET=1" in TritonAttention.why_unsupported(make_spec())


def test_dense_attention_of_a_soft_cap_near_zero_keeps_its_digits() -> None:
    """Small scores under a large cap: tanh must not lose what is left of them."""
    spec = make_spec(logit_softcap=50.0, scale=0.01, device=GPU)
    case = Case(spec=spec, lengths=((1, 60), (4, 30)))
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(TritonAttention, case, inputs).out)


def test_nan_in_a_padding_free_row_stays_in_its_row() -> None:
    case = Case(spec=make_spec(device=GPU), lengths=((1, 40), (1, 40), (1, 40)))
    inputs = make_inputs(case)
    exact = attention(case, inputs, torch.float64)
    inputs.k[1][3] = float("nan")

    out = run(ManySplits, case, inputs).out

    assert out[1].isnan().all()
    for i in (0, 2):
        assert (out[i].double() - exact[i]).abs().max() < 1e-5
