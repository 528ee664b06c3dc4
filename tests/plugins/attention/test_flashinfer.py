"""The backend `flashinfer`: what it serves and calls, anywhere; its kernels, on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from quire.errors import KernelError
from quire.interfaces.attention import GraphSupport
from quire.interfaces.batch import Batch
from quire.testing.attention_cases import LIMITS, Layer, make_batch, make_spec
from quire.testing.kit import AttentionBackendTests, Profile
from quire_attention.flashinfer import library, pages, to_decode, xqa
from quire_attention.flashinfer.backend import FlashInferAttention, add_sinks
from quire_attention.flashinfer.paged import PagedAttention, PageMemory
from quire_attention.triton.backend import TritonAttention

IS_USABLE = torch.cuda.is_available() and library.why_unusable() is None
CPU = torch.device("cpu")


def served(**changes: Any) -> Any:
    """A spec that the backend serves."""
    dims = {"head_dim": 64, "value_head_dim": 64, "scale": 0.125}
    values = {**dims, "dtype": "bfloat16", "block_size": 16, "device": "cuda", **changes}
    return make_spec(**values)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_USABLE, reason="needs a CUDA device and flashinfer-python")
class TestFlashInfer(AttentionBackendTests):
    backend = FlashInferAttention
    device = "cuda"
    profile = Profile(name="few", seconds=12, examples=500, longest=700, shrink_s=3)


# What lies on the device


def batch_of(*spans: tuple[int, int], **changes: Any) -> Batch:
    """A batch whose sequence i has blocks 10 i + 1, 10 i + 2, ..."""
    tables = [[10 * i + n + 1 for n in range(9)] for i in range(len(spans))]
    return attrs.evolve(make_batch(list(spans), tables, 16), **changes)


def test_pages_are_fetched_from_a_strided_block_table() -> None:
    memory = PageMemory(served(), LIMITS, CPU)
    table = torch.arange(60, dtype=torch.int32).view(4, 15)[:, :9]
    lists = pages.page_lists(
        [1, 1], [40, 17], block_size=16, first_row=2, num_rows=3, table_stride=15
    )

    memory.upload(lists, table, slot=1)

    query_starts, kv_starts, found, last_lens = memory.views(3)
    found = found[:5]
    assert query_starts.tolist() == [0, 1, 2, 2]
    assert kv_starts.tolist() == [0, 3, 5, 5]
    assert found.tolist() == [30, 31, 32, 45, 46]
    assert last_lens.tolist() == [8, 1, 0]


def test_lists_of_every_step_lie_at_one_place() -> None:
    memory = PageMemory(served(), LIMITS, CPU)
    lengths = ([40, 17, 100], [16, 1, 1])
    places = []

    for slot, seq_lens in enumerate(lengths):
        lists = pages.page_lists(
            [1] * 3, seq_lens, block_size=16, first_row=0, num_rows=3, table_stride=9
        )
        memory.upload(lists, torch.ones(3, 9, dtype=torch.int32), slot)
        places.append([view.data_ptr() for view in memory.views(3)])

    assert places[0] == places[1]


def test_steps_in_flight_are_staged_apart() -> None:
    kernel = paged()
    staged = []

    for slot in range(LIMITS.max_steps_in_flight + 2):
        kernel.plan(batch_of((39, 40), in_flight_slot=slot), 0, first=0, end=1)
        lists = kernel._lists._staged[slot]
        staged += [kernel._module.pinned[-1], lists.data_ptr()]
        assert lists[:2].tolist() == [0, 1]

    assert len(set(staged)) == 2 * (LIMITS.max_steps_in_flight + 2)


def test_memory_counts_what_it_holds() -> None:
    spec = served()
    memory = PageMemory(spec, LIMITS, CPU)

    held = memory._memory.numel() + memory._pages.numel()

    assert PageMemory.num_entries(spec, LIMITS) == held


# Arguments of the library


class Recorder:
    """Takes the place of the library's module and keeps the arguments."""

    def __init__(self) -> None:
        self.planned: list[tuple[Any, ...]] = []
        self.run: list[tuple[Any, ...]] = []
        self.pinned: list[int] = []

    def plan(self, *arguments: Any) -> list[int]:
        # What the lists said at the call: their memory is not kept.
        self.pinned.append(arguments[2].data_ptr())
        self.planned.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments))
        return [len(self.planned)]

    def paged_run(self, *arguments: Any) -> None:
        self.run.append(arguments)


def paged(kernel: str = "fa2", *, causal: bool = False, **changes: Any) -> Any:
    """A recording kernel on the CPU."""
    spec = attrs.evolve(served(num_heads=4, num_kv_heads=2), device="cpu", **changes)
    partial = torch.zeros(64, dtype=torch.uint8)
    return PagedAttention(
        Recorder(), spec, LIMITS, kernel=kernel, causal=causal, partial=partial, num_sms=8
    )


def test_decodes_are_planned_with_the_lengths_of_the_host() -> None:
    kernel = paged(sliding_window=20)

    kernel.plan(batch_of((39, 40), (16, 17), (0, 5)), 0, first=0, end=2)

    arguments = kernel._module.planned[0]
    assert [x.tolist() for x in arguments[3:6]] == [[0, 1, 2], [0, 3, 5], [40, 17]]
    sizes = (2, 2, 4, 2, 16, False, 64, 64)
    assert arguments[6:] == (*sizes, False, 19, -1, False, 0)


def test_prompts_are_planned_for_fa3_behind_the_decodes() -> None:
    kernel = paged("fa3", causal=True)

    part = kernel.plan(batch_of((39, 40), (16, 17), (0, 5), (30, 40)), 0, first=2, end=4)

    arguments = kernel._module.planned[0]
    assert [x.tolist() for x in arguments[3:6]] == [[0, 5, 15], [0, 1, 4], [5, 40]]
    assert arguments[6:] == (15, 2, 4, 2, 16, False, 64, 64, True, -1)
    assert (part.first_token, part.num_tokens) == (2, 15)
    assert kernel._lists.views(2)[2][:4].tolist() == [21, 31, 32, 33]


def test_plan_of_a_captured_step_names_no_length() -> None:
    kernel = paged()
    steps = [batch_of((39, 40), (16, 17)), batch_of((0, 1))]

    for step in steps:
        table = torch.zeros(5, 9, dtype=torch.int32)
        group = attrs.evolve(step.groups[0], block_table=table)
        captured = GraphSupport.SINGLE_TOKEN
        step = attrs.evolve(step, groups=(group,), captured_for=captured, padded_to=5)
        kernel.plan(step, 0, first=0, end=5)

    first, second = kernel._module.planned
    assert first[6:] == second[6:]
    assert first[6:12] == (5, 5, 4, 2, 16, True)
    assert [x.tolist() for x in second[3:6]] == [[0, 1, 2, 3, 4, 5], [0] + [1] * 5, [1] + [0] * 4]


def test_part_runs_on_its_own_rows_of_the_cache_itself() -> None:
    kernel = paged(logit_softcap=30.0, scale=0.5)
    part = kernel.plan(batch_of((16, 17), (0, 5)), 0, first=0, end=1)
    q, out = torch.zeros(6, 4, 64), torch.zeros(6, 4, 64)
    cache = torch.zeros(40, 2, 16, 128)

    part.run(q, cache, out, None)

    arguments = kernel._module.run[0]
    assert arguments[2] == part.info == [1]
    assert [len(x) for x in (arguments[3], arguments[10])] == [1, 1]
    keys, values = arguments[4:6]
    assert keys.shape == values.shape == (40, 16, 2, 64)
    assert keys.data_ptr() == cache.data_ptr()
    assert values.data_ptr() == cache[0, 0, 0, 64:].data_ptr()
    assert keys.stride() == values.stride() == (2 * 16 * 128, 128, 16 * 128, 1)
    # All the room for pages: without entries, as where a graph is captured, there is no address.
    assert [len(x) for x in arguments[6:10]] == [2, 2, len(kernel._lists._pages), 1]
    assert arguments[11:16] == (None, 0, 0, -1, False)
    assert arguments[16:] == (None,) * 6 + (30.0, 0.5) + (None,) * 3 + (1.0, 1e4, 0, 64)


def test_prompts_of_a_part_are_run_with_the_causal_mask() -> None:
    kernel = paged("fa3", causal=True)
    part = kernel.plan(batch_of((0, 5)), 0, first=0, end=1)

    part.run(torch.zeros(5, 4, 64), torch.zeros(9, 2, 16, 128), torch.zeros(5, 4, 64), None)

    assert kernel._module.run[0][12] == 1


def test_padding_of_an_xqa_step_becomes_zeros() -> None:
    seen: dict[str, Tensor] = {}

    def fill(*arguments: Any, **more: Any) -> None:
        seen["lengths"], seen["scale"] = arguments[4], more["q_scale"]
        arguments[5][:1].fill_(3.0)
        arguments[5][1:].fill_(float("nan"))

    attention = object.__new__(xqa.XqaAttention)
    attention.spec, attention._xqa = served(), fill
    attention._scratch = attention._arrived = torch.zeros(1)
    lengths = torch.tensor([7, 0], dtype=torch.int32)
    table = torch.zeros(2, 9, dtype=torch.int32)
    rows = xqa.XqaRows(block_table=table, seq_lens=lengths, is_padded=True)
    q, out = torch.zeros(2, 4, 64), torch.full((2, 4, 64), 5.0)

    attention.run(Layer(), rows, q, torch.zeros(9, 2, 16, 128), out)

    assert out[0].unique().tolist() == [3.0]
    assert not out[1].any()
    assert seen["lengths"].tolist() == [[7], [1]]
    assert seen["scale"] == pytest.approx(1.0)


XQA_REFUSED = {
    "blocks of 8": {"block_size": 8},
    "soft cap": {"logit_softcap": 30.0},
    "64 query heads a KV head": {"num_heads": 64, "num_kv_heads": 1},
}


@pytest.mark.parametrize("words", XQA_REFUSED)
def test_xqa_refuses_what_its_kernels_have_not(words: str) -> None:
    assert words in str(xqa.why_unsupported(served(**XQA_REFUSED[words]), (9, 0)))
    assert xqa.why_unsupported(served(), (9, 0)) is None
    assert "compute capability 8.0" in str(xqa.why_unsupported(served(), (8, 0)))


def test_sinks_take_their_share_of_a_finished_result() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, 7, generator=generator)
    values = torch.randn(5, 3, 7, 4, generator=generator)
    sinks = torch.tensor([0.5, -2.0, 3.0])
    out = (scores.softmax(-1).unsqueeze(-1) * values).sum(-2)

    lse = add_sinks(out, scores.logsumexp(-1), sinks)

    whole = torch.cat((scores, sinks.expand(5, 3).unsqueeze(-1)), -1)
    exact = (whole.softmax(-1)[..., :7].unsqueeze(-1) * values).sum(-2)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, whole.logsumexp(-1))


# What is served


REFUSED = {
    "latent attention": {"latent": object()},
    "ALiBi": {"alibi": True},
    "bidirectional attention": {"causal": False},
    "batch invariance": {"batch_invariant": True},
    "module for float32-64": {"dtype": "float32", "kv_dtype": "float32"},
    "module for bfloat16-96": {"head_dim": 96, "value_head_dim": 96},
    "module for bfloat16-64-softcap": {"logit_softcap": 30.0},
    "KV cache in another dtype": {"kv_dtype": "float8_e4m3fn"},
    "values of another width": {"value_head_dim": 32},
    "65 query heads a KV head": {"num_heads": 65, "num_kv_heads": 1},
    "scale of zero or less": {"scale": 0.0},
    "runs on an NVIDIA GPU, not on 'cpu'": {"device": "cpu"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_flashinfer_says_what_it_has_not(words: str) -> None:
    assert FlashInferAttention.why_unsupported(served()) is None

    assert words in str(FlashInferAttention.why_unsupported(served(**REFUSED[words])))


def test_flashinfer_refuses_what_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "built_variants", lambda: frozenset({"bfloat16-64"}))

    reason = FlashInferAttention.why_unsupported(served(sliding_window=9))

    assert reason == "its module for bfloat16-64-window is not built; run `quire build flashinfer`"
    assert FlashInferAttention.why_unsupported(served()) is None


def test_flashinfer_shares_the_cache_of_triton() -> None:
    spec = served()

    assert FlashInferAttention.kv_layout(spec) == TritonAttention.kv_layout(spec)


def test_flashinfer_needs_a_cache() -> None:
    backend: Any = object.__new__(FlashInferAttention)

    with pytest.raises(KernelError, match="needs a KV cache"):
        backend.attend(Layer(), *[torch.zeros(1)] * 3, None, None, torch.zeros(1))


def test_keys_and_values_are_written_into_their_slots() -> None:
    backend: Any = object.__new__(FlashInferAttention)
    backend.spec = served()
    layout = FlashInferAttention.kv_layout(backend.spec)
    cache = torch.zeros(3, *layout.block_shape)
    k, v = torch.randn(2, 2, 64), torch.randn(2, 2, 64)

    backend.write(Layer(), k, v, cache, SimpleNamespace(slots=torch.tensor([17, 47])))

    assert (cache[1, :, 1] == torch.cat((k[0], v[0]), -1)).all()
    assert (cache[2, :, 15] == torch.cat((k[1], v[1]), -1)).all()
    assert cache.count_nonzero() == k.numel() + v.numel()


def test_option_names_a_way_to_decode() -> None:
    assert to_decode("xqa") == "xqa"
    with pytest.raises(ValueError, match="allowed: auto, paged, xqa"):
        to_decode("fast")
