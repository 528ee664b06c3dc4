"""Captured steps give the tokens of steps that are not, whatever is in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from replaying import ReplayingCapture
from tiny_llama import has_all_blocks, make_engine, prompt, request, run_all
from torch import Tensor

from quire.engine import Engine
from quire.execution.step_graphs import MOST_ABSORBED, decode_sizes, mixed_sizes
from quire.interfaces.attention import GraphSupport, LatentSpec
from quire.interfaces.batch import Batch
from quire.start import STEPS_IN_FLIGHT, Starter
from quire.testing.attention_cases import make_spec
from quire_attention.reference.backend import ReferenceAttention
from quire_models.decoder import DecoderStack
from quire_sampling.reference.sampler import ReferenceSampler

LENGTHS = (1, 3, 9, 17, 30)


@pytest.fixture(params=[GraphSupport.SINGLE_TOKEN, GraphSupport.ANY])
def capture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ReplayingCapture:
    found = ReplayingCapture()
    monkeypatch.setattr(ReferenceAttention, "graph_support", request.param)
    monkeypatch.setattr(Starter, "_capture", lambda *_: found)
    monkeypatch.setattr(ReferenceSampler, "capturable", True)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"))


def eager_engine(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Engine:
    with monkeypatch.context() as patch:
        patch.setattr(Starter, "_capture", lambda *_: None)
        return make_engine(folder, attention_backend="reference", **options)


def graph_engine(folder: Path, capture: ReplayingCapture, **options: Any) -> Engine:
    engine = make_engine(folder, attention_backend="reference", **options)
    capture.last_tokens = engine.runner._builder.last_tokens
    return engine


WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 3},
    "filtered": {"temperature": 1.2, "seed": 3, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
    "several answers": {"temperature": 0.9, "seed": 5, "n": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "log-probabilities": {"logprobs": 2},
    "of the prompt too": {"prompt_logprobs": 1},
    "a least length": {"min_tokens": 6},
    "a beam search": {"n": 2, "beam_search": {"beam_width": 3}},
}
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "chunks of seven tokens": {"max_num_batched_tokens": 7},
    "blocks of one token": {"block_size": 1},
    # 22 blocks of 4 tokens hold one of the long sequences beside a few short ones.
    "preempted": {"kv_cache_memory_bytes": 22 * 4 * 2 * 2 * 2 * 8 * 4, "max_model_len": 60},
}


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("wishes", WISHES.values(), ids=WISHES.keys())
def test_replayed_steps_give_the_tokens_of_eager_ones(
    folder: Path,
    capture: ReplayingCapture,
    monkeypatch: pytest.MonkeyPatch,
    wishes: dict[str, Any],
    options: dict[str, Any],
) -> None:
    asked = [request(i, prompt(i, n), **wishes) for i, n in enumerate(LENGTHS)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch, **options), asked)
    engine = graph_engine(folder, capture, **options)

    found, _ = run_all(engine, asked)

    assert found == wanted
    assert capture.num_replays > 0
    assert has_all_blocks(engine)


@pytest.mark.parametrize(("depth", "kv_cache_dtype"), [(2, "auto"), (3, "fp8")])
def test_windows_leave_blocks_behind_replayed_steps(
    tmp_path: Path,
    capture: ReplayingCapture,
    monkeypatch: pytest.MonkeyPatch,
    depth: int,
    kv_cache_dtype: str,
) -> None:
    """Slabs change hands between layers while steps are in flight."""
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    folder = tiny_llama.write_folder(
        tmp_path, architectures=["Qwen2ForCausalLM"], num_hidden_layers=3, **windows
    )
    asked = [request(i, prompt(i, n), max_tokens=20, n=2) for i, n in enumerate((60, 5, 33, 47))]
    options = {"max_num_batched_tokens": 12, "max_model_len": 96, "kv_cache_dtype": kv_cache_dtype}
    wanted, _ = run_all(eager_engine(folder, monkeypatch, **options), asked)
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", depth)
    tight = 31 * (1024 if kv_cache_dtype == "auto" else 256)  # slabs of two layers' blocks
    engine = graph_engine(folder, capture, kv_cache_memory_bytes=tight, **options)
    assert engine.block_manager.slabs is not None

    found = [run_all(engine, asked)[0] for _ in range(2)]

    assert found == [wanted] * 2
    assert capture.num_replays > 0
    assert engine.scheduler.num_preemptions > 0
    assert has_all_blocks(engine)


def test_steps_with_prompts_are_replayed_where_backends_can(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, 20 + i), max_tokens=3) for i in range(4)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch), asked)
    engine = graph_engine(folder, capture, enable_prefix_caching=False)
    graphs = engine.runner.mixed_graphs
    assert (graphs is not None) == (ReferenceAttention.graph_support is GraphSupport.ANY)

    # All four prompts in one step, then in a step of a decoding one.
    for _ in range(3):
        assert run_all(engine, asked)[0] == wanted

    if graphs is not None:
        assert graphs.num_captured == 2  # the largest, at the start, and that of 86 tokens
        assert [size for size, _, _ in graphs._captured] == [graphs.sizes[-1], 96]


def test_model_that_returns_all_tokens_is_replayed_too(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, n)) for i, n in enumerate(LENGTHS)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch), asked)
    forward = DecoderStack.forward

    def everything(stack: DecoderStack, hidden: Tensor, batch: Batch) -> Tensor:
        keeps_all = evolve(batch, logit_rows=batch.logit_rows[:0])
        return forward(stack, hidden, keeps_all)

    monkeypatch.setattr(DecoderStack, "forward", everything)

    assert run_all(graph_engine(folder, capture), asked)[0] == wanted


def test_steps_go_on_where_no_memory_is_left_for_their_graphs(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, n)) for i, n in enumerate(LENGTHS)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch), asked)
    engine = graph_engine(folder, capture)
    tried = []

    def full(_run: Callable[[], Tensor]) -> Any:
        tried.append(1)
        raise torch.cuda.OutOfMemoryError("no memory")

    for graphs in (engine.runner.decode_graphs, engine.runner.mixed_graphs):
        if graphs is not None:
            graphs._capture = full

    for _ in range(2):
        assert run_all(engine, asked)[0] == wanted
    assert 1 <= len(tried) <= 2  # once for each kind of graphs


def test_first_step_of_all_may_sample_nobody(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_num_batched_tokens": 7}
    asked = [request(0, prompt(0, 20))]
    wanted, _ = run_all(eager_engine(folder, monkeypatch, **options), asked)

    assert run_all(graph_engine(folder, capture, **options), asked)[0] == wanted


def test_all_wishes_in_one_batch_give_the_tokens_of_eager_steps(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, 5 + i), **wish) for i, wish in enumerate(WISHES.values())]
    wanted, _ = run_all(eager_engine(folder, monkeypatch, max_num_seqs=16), asked)
    engine = graph_engine(folder, capture, max_num_seqs=16)

    for _ in range(2):  # the second time the prompts' blocks are cached
        assert run_all(engine, asked)[0] == wanted
    assert has_all_blocks(engine)


def test_tables_longer_than_the_fixed_memory_go_up_apart(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, n), n=2) for i, n in enumerate(LENGTHS)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch), asked)
    engine = graph_engine(folder, capture)
    assert engine.runner.decode_graphs is not None
    engine.runner.decode_graphs._step._most_changes = 0

    for _ in range(2):  # the second time with prefix hits, whose last tokens the host knows
        assert run_all(engine, asked)[0] == wanted


def test_aborted_sequences_leave_the_others_alone(
    folder: Path, capture: ReplayingCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(i, prompt(i, 9)) for i in range(6)]
    wanted, _ = run_all(eager_engine(folder, monkeypatch), asked)
    engine = graph_engine(folder, capture)
    for one in asked:
        engine.add_request(one)
    found: dict[tuple[str, int], list[int]] = {}
    for step in range(30):
        if step in (4, 6):
            engine.abort(f"r{step - 4}")
        for update in engine.step():
            found.setdefault((update.request_id, 0), []).extend(update.token_ids)

    for number in (1, 3, 4, 5):
        assert found[f"r{number}", 0] == wanted[f"r{number}", 0]
    assert has_all_blocks(engine)


def test_graphs_are_captured_at_the_second_step_of_a_size(
    folder: Path, capture: ReplayingCapture
) -> None:
    engine = graph_engine(folder, capture)
    assert engine.runner.decode_graphs is not None
    at_the_start = engine.runner.decode_graphs.num_captured

    run_all(engine, [request(i, prompt(i, 4), max_tokens=3) for i in range(3)])
    after_one_replay = engine.runner.decode_graphs.num_captured
    run_all(engine, [request(i, prompt(i, 4), max_tokens=9) for i in range(3)])

    assert after_one_replay == at_the_start + 1
    assert engine.runner.decode_graphs.num_captured == after_one_replay


@given(st.integers(1, 5000))
def test_sizes_rise_to_the_largest_batch_and_waste_little(max_num_seqs: int) -> None:
    sizes = decode_sizes(max_num_seqs)

    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == min(max_num_seqs, 512)
    for below, above in itertools.pairwise(sizes):
        assert above - below <= max(4, above // 4)


def test_long_steps_of_latents_are_not_captured() -> None:
    sizes = LatentSpec(kv_lora_rank=16, rope_head_dim=4, nope_head_dim=8, v_head_dim=8)
    plain = make_spec()
    latent = make_spec(num_kv_heads=1, head_dim=20, value_head_dim=16, latent=sizes)

    assert mixed_sizes(8192, [plain])[-1] == 8192
    assert mixed_sizes(8192, [plain, latent])[-1] == MOST_ABSORBED
    assert mixed_sizes(100, [latent])[-1] == 100
