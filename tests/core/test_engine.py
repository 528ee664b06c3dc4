"""The engine on a random Llama: the same tokens however they are computed, and one death only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from attrs import evolve
from tiny_llama import has_all_blocks, make_engine, prompt, request, run_all

from quire.engine import Engine
from quire.errors import ConfigError, EngineDeadError, RequestError
from quire.request import FinishReason, Request
from quire.scheduling.output import SchedulerOutput
from quire.start import Starter

LENGTHS = (1, 3, 4, 5, 17, 30, 41)
Tokens = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"))


def requests_of_all_lengths(**params: Any) -> list[Request]:
    return [request(i, prompt(i, length), **params) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Tokens:
    """Each request by itself, in one chunk, without a prefix cache, by the oracle backend."""
    tokens: Tokens = {}
    engine = make_engine(
        folder, attention_backend="reference", enable_prefix_caching=False, block_size=64
    )
    for one in requests_of_all_lengths():
        tokens |= run_all(engine, [one])[0]
    return tokens


WAYS: dict[str, dict[str, Any]] = {
    "all together": {},
    "chunks of one token": {"max_num_batched_tokens": 1, "max_num_seqs": 3},
    "chunks of seven tokens": {"max_num_batched_tokens": 7},
    "blocks of one token": {"block_size": 1},
    "blocks of 32 tokens": {"block_size": 32},
    "two at once": {"max_num_seqs": 2},
    "reference attention": {"attention_backend": "reference"},
    "two backends": {"attention_backend": "prefill=reference,decode=sdpa"},
    "two backends in chunks": {
        "attention_backend": "prefill=sdpa,decode=reference",
        "max_num_batched_tokens": 7,
    },
    "without prefix cache": {"enable_prefix_caching": False},
    "by priority": {"scheduling_policy": "priority"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_greedy_tokens_are_the_same_in_every_way_of_computing_them(
    folder: Path, alone: Tokens, options: dict[str, Any]
) -> None:
    engine = make_engine(folder, **options)

    tokens, _ = run_all(engine, requests_of_all_lengths())

    assert tokens == alone
    assert has_all_blocks(engine)


@pytest.mark.parametrize("name", ["reference", "sdpa", "triton"])
def test_greedy_tokens_are_the_same_with_every_backend(
    folder: Path, alone: Tokens, name: str
) -> None:
    engine = make_engine(folder, attention_backend=name)
    few = requests_of_all_lengths()[::4]

    tokens, _ = run_all(engine, few)

    assert tokens == {request_id: alone[request_id] for request_id in tokens}
    assert len(tokens) == len(few)


def test_two_backends_serve_several_groups_of_layers(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    folder = tiny_llama.write_folder(tmp_path, architectures=["Qwen2ForCausalLM"], **windows)
    tokens = {}
    for name in ("reference", "prefill=sdpa,decode=reference"):
        engine = make_engine(
            folder, load_format="dummy", attention_backend=name, max_num_batched_tokens=7
        )
        assert len(engine.layout.groups) == 2
        tokens[name], _ = run_all(engine, requests_of_all_lengths())

    assert tokens["reference"] == tokens["prefill=sdpa,decode=reference"]


def test_preempted_sequences_give_the_tokens_of_those_that_never_were(
    folder: Path, alone: Tokens
) -> None:
    # 22 blocks of 4 tokens hold one of the long sequences beside a few short ones.
    engine = make_engine(folder, kv_cache_memory_bytes=22 * 4 * 2 * 2 * 2 * 8 * 4, max_model_len=60)
    assert engine.layout.kv_size.num_blocks == 22

    tokens, _ = run_all(engine, requests_of_all_lengths())

    assert engine.scheduler.num_preemptions > 0
    assert tokens == alone
    assert has_all_blocks(engine)


def test_warm_prefix_cache_gives_the_tokens_of_a_cold_one(folder: Path, alone: Tokens) -> None:
    engine = make_engine(folder)

    _, cold_updates = run_all(engine, requests_of_all_lengths())
    warm, warm_updates = run_all(engine, requests_of_all_lengths())

    assert warm == alone
    assert all(update.num_cached_tokens == 0 for update in cold_updates)
    # Whole blocks of 4, and never the last token.
    hits = {update.request_id: update.num_cached_tokens for update in warm_updates}
    assert hits == {f"r{i}": (n - 1) // 4 * 4 for i, n in enumerate(LENGTHS)}


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"block_size": 16}])
def test_children_of_one_request_each_give_the_tokens_of_one_alone(
    folder: Path, alone: Tokens, options: dict[str, Any]
) -> None:
    engine = make_engine(folder, **options)

    tokens, _ = run_all(engine, requests_of_all_lengths(n=3))

    for (request_id, _), found in tokens.items():
        assert found == alone[request_id, 0]
    assert len(tokens) == 3 * len(LENGTHS)
    assert has_all_blocks(engine)


def test_seeded_draws_do_not_depend_on_what_else_runs(folder: Path) -> None:
    params = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "n": 2}
    mine = request(0, prompt(0, 9), **params)
    others = [request(i, prompt(i, 2 * i), temperature=1.5, seed=i) for i in range(1, 6)]

    by_itself, _ = run_all(make_engine(folder), [mine])
    in_a_crowd, _ = run_all(make_engine(folder, max_num_batched_tokens=9), [*others, mine])

    assert by_itself["r0", 0] == in_a_crowd["r0", 0]
    assert by_itself["r0", 1] == in_a_crowd["r0", 1]
    assert by_itself["r0", 0] != by_itself["r0", 1]


def test_sequence_stops_at_max_tokens_stop_tokens_and_the_context(
    folder: Path, alone: Tokens
) -> None:
    first = alone["r0", 0]
    stop = first[4]
    earliest = first.index(stop)
    engine = make_engine(folder, max_model_len=48)
    stopping = request(1, prompt(0, LENGTHS[0]), stop_token_ids=(stop,))
    requests = [
        request(0, prompt(0, LENGTHS[0]), max_tokens=3),
        evolve(stopping, stop_token_ids=frozenset({stop})),
        request(2, prompt(6, 41), max_tokens=100),
    ]
    tokens, updates = run_all(engine, requests)

    reasons = {u.request_id: (u.finish_reason, u.stop_reason) for u in updates if u.finish_reason}
    assert tokens["r0", 0] == first[:3]
    assert tokens["r1", 0] == first[: earliest + 1]
    assert len(tokens["r2", 0]) == 48 - 41
    assert reasons == {
        "r0": (FinishReason.LENGTH, None),
        "r1": (FinishReason.STOP, stop),
        "r2": (FinishReason.LENGTH, None),
    }


def test_step_is_schedule_dispatch_and_collect(folder: Path, alone: Tokens) -> None:
    engine = make_engine(folder)
    engine.add_request(request(0, prompt(0, LENGTHS[0])))
    tokens: list[int] = []

    while (output := engine.schedule()) is not None:
        launched = engine.dispatch(output)
        result = engine.collect(launched)
        assert result.step_id == output.step_id
        for update in engine.scheduler.update(result):
            tokens += update.token_ids

    assert tokens == alone["r0", 0]


def test_two_steps_may_be_in_flight(folder: Path, alone: Tokens) -> None:
    engine = make_engine(folder, max_num_batched_tokens=9)
    engine._depth = 2

    tokens, _ = run_all(engine, requests_of_all_lengths())

    assert tokens == alone
    assert has_all_blocks(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_step_is_timed_once_with_what_it_computed(folder: Path, depth: int) -> None:
    engine = make_engine(folder, max_num_batched_tokens=9)
    engine._depth = depth
    engine.add_request(request(0, prompt(0, 20), max_tokens=4))
    sizes = []

    while engine.has_unfinished():
        engine.step()
        sizes.append((engine.timing.num_tokens, engine.timing.num_seqs))
    engine.step()

    assert sizes == [(9, 1), (9, 1), (2, 1), (1, 1), (1, 1), (1, 1)]
    assert engine.timing.num_tokens == engine.timing.num_seqs == 0


@pytest.fixture
def engine(folder: Path) -> Engine:
    return make_engine(folder)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_aborted_request_gives_its_blocks_back(engine: Engine, num_steps: int) -> None:
    for one in requests_of_all_lengths(n=2):
        engine.add_request(one)
    for _ in range(num_steps):
        engine.step()

    for i in range(len(LENGTHS)):
        engine.abort(f"r{i}")

    assert not engine.has_unfinished()
    assert engine.step() == []
    assert has_all_blocks(engine)


def test_nan_in_one_request_ends_that_request_alone(folder: Path, alone: Tokens) -> None:
    engine = make_engine(folder, max_num_seqs=4)
    poison = 50
    good = [one for one in requests_of_all_lengths() if poison not in alone[one.request_id, 0]]
    good = [one for one in good if poison not in one.prompt_token_ids]
    engine.runner.model.model.embed_tokens.weight.data[poison] = float("nan")
    bad = [request(100 + i, [1, 2, poison, 3, *prompt(i, i)]) for i in range(6)]

    tokens, updates = run_all(engine, [bad[0], *good[:2], *bad[1:4], *good[2:], *bad[4:]])

    errors = {u.request_id: u.error for u in updates if u.finish_reason is FinishReason.ERROR}
    assert set(errors) == {one.request_id for one in bad}
    assert all("not finite" in str(error) for error in errors.values())
    assert len(good) >= 4
    for one in good:
        assert tokens[one.request_id, 0] == alone[one.request_id, 0]
    assert has_all_blocks(engine)


def test_request_that_can_never_fit_is_refused_and_the_engine_goes_on(
    folder: Path, alone: Tokens
) -> None:
    engine = make_engine(folder, max_model_len=40)

    with pytest.raises(RequestError):
        engine.add_request(request(9, prompt(0, 40)))

    tokens, _ = run_all(engine, requests_of_all_lengths()[:3])
    assert tokens == {key: alone[key] for key in tokens}


def test_check_of_arguments_that_fails_refuses_that_request_alone(engine: Engine) -> None:
    class Broken:
        @classmethod
        def check_arguments(cls, arguments: Any, params: Any) -> None:
            raise KeyError("no such thing")

    engine._processors = {"broken": Broken}  # type: ignore[dict-item]

    with pytest.raises(RequestError, match="no such thing"):
        engine.add_request(request(0, prompt(0, 3), extra_args={"broken": {}}))

    assert not engine.has_unfinished()


def test_memory_that_runs_out_at_the_start_is_told_item_by_item(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Starter, "_fill", fill)

    with pytest.raises(
        ConfigError, match=r"weights .*KV blocks .*--gpu-memory-utilization"
    ) as found:
        make_engine(folder)

    assert len(str(found.value).splitlines()) == 1


def test_step_that_fails_as_a_whole_kills_the_engine_for_good(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(output: SchedulerOutput) -> None:
        raise RuntimeError("a kernel fault")

    monkeypatch.setattr(engine.runner, "dispatch", fail)
    engine.add_request(request(0, prompt(0, 3)))

    with pytest.raises(
        EngineDeadError, match="in step 1, with attention by sdpa: RuntimeError: a kernel fault"
    ) as caught:
        engine.step()

    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineDeadError, match="stopped earlier"):
        engine.step()
    with pytest.raises(EngineDeadError, match="stopped earlier"):
        engine.add_request(request(1, prompt(0, 3)))


def test_engine_says_what_it_chose_and_where_the_memory_goes(engine: Engine) -> None:
    budget = engine.layout.budget

    assert {choice.kind: choice.used for choice in engine.selections} == {
        "model": "llama",
        "quantization": "none",
        "grammar": "llguidance",
        "attention": "sdpa",
        "sampler": "reference",
    }
    parameters = sum(p.numel() * p.element_size() for p in engine.runner.model.parameters())
    assert budget.weights == parameters
    assert budget.kv_blocks == engine.layout.kv_size.num_blocks * 4 * 2 * 2 * 2 * 8 * 4
    assert engine.max_model_len == 256


def test_longest_context_that_fits_is_found_by_auto_and_served(folder: Path) -> None:
    engine = make_engine(
        folder, kv_cache_memory_bytes=10 * 4 * 2 * 2 * 2 * 8 * 4, max_model_len="auto"
    )

    assert engine.max_model_len == 36
    tokens, _ = run_all(engine, [request(0, prompt(0, 30), max_tokens=50)])
    assert len(tokens["r0", 0]) == 6


def test_nan_weights_deep_in_a_file_are_refused_while_loading(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny_llama.write_folder(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][31, 47] = float("nan")
    save_file(tensors, file)

    with pytest.raises(ConfigError, match=r"down_proj\.weight' holds NaN"):
        make_engine(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_engine_runs_to_the_end(folder: Path, dtype: str) -> None:
    engine = make_engine(folder, dtype=dtype)

    tokens, updates = run_all(engine, requests_of_all_lengths())

    assert {len(found) for found in tokens.values()} == {12}
    assert not any(update.error for update in updates)
    assert all(0 <= t < 101 for found in tokens.values() for t in found)
    assert torch.get_num_threads() == 1
