"""The backend `cuda`: what it refuses and builds, anywhere; its kernels, on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from quire.errors import BuildError, KernelError
from quire.interfaces.attention import AttentionBackend, GraphSupport
from quire.testing.attention_cases import (
    LIMITS,
    Case,
    Layer,
    make_batch,
    make_inputs,
    make_layer,
    make_spec,
    step_batch,
    step_tensors,
)
from quire.testing.attention_run import Subject, run
from quire.testing.dense import check_within_bound
from quire.testing.kit import AttentionBackendTests, Profile
from quire.testing.mixed_graph_steps import MixedGraphStep
from quire_attention.cuda import library
from quire_attention.cuda.backend import CudaAttention
from quire_attention.cuda.tiles import TileCut, TileLists
from quire_attention.cuda.wide import WideBlocks
from quire_attention.triton.backend import TritonAttention

HAS_GPU = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
HAS_COMPILER = library.native.CUDA.why_missing() is None


def served(**changes: Any) -> Any:
    """A spec that the kernels serve."""
    dims = {"head_dim": 64, "value_head_dim": 64, "scale": 0.125}
    values = {**dims, "dtype": "bfloat16", "block_size": 16, "device": "cuda", **changes}
    return make_spec(**values)


class CudaWithoutHopper(CudaAttention):
    """The kernels of older and newer GPUs, wherever they run."""

    with_hopper = False


class CudaWithoutWideBlocks(CudaAttention):
    """What captured steps use, and prompts that see too much, for quantized caches in all steps."""

    with_wide_blocks = False


class OnTheGpu(AttentionBackendTests):
    """The kit, with a compilation at most."""

    pytestmark = GPU
    device = "cuda"
    profile = Profile(name="few", seconds=12, examples=500, longest=700, shrink_s=3)


class TestCuda(OnTheGpu):
    backend = CudaAttention


class TestCudaWithoutHopper(OnTheGpu):
    backend = CudaWithoutHopper


class TestCudaWithoutWideBlocks(OnTheGpu):
    backend = CudaWithoutWideBlocks
    specs = tuple(
        served(head_dim=dim, value_head_dim=dim, kv_dtype=name)
        for dim in (64, 128, 256)
        for name in ("float8_e4m3fn", "float8_e5m2")
    )


del OnTheGpu


def test_struct_of_python_is_the_struct_of_the_kernels() -> None:
    text = (library.FOLDER / "arguments.h").read_text()
    body = re.search(r"struct Arguments \{(.*?)\n\};", text, re.DOTALL).group(1)
    found = re.findall(r"^    (?:const )?(\S+) (\w+);$", body, re.MULTILINE)
    kinds = {"int64_t": "c_long", "int32_t": "c_int", "float": "c_float"}

    declared = [(name, kind.__name__) for name, kind in library.Arguments._fields_]

    wanted = [(name, "c_void_p" if "*" in kind else kinds[kind]) for kind, name in found]
    assert declared == wanted


REFUSED = {
    "latent attention": {"latent": object()},
    "ALiBi": {"alibi": True},
    "bidirectional attention": {"causal": False},
    "batch invariance": {"batch_invariant": True},
    "float32, only bfloat16 and float16": {"dtype": "float32", "kv_dtype": "float32"},
    "KV cache in another dtype": {"kv_dtype": "float16"},
    "heads of 80, only of (64, 96, 128, 256)": {"head_dim": 80, "value_head_dim": 80},
    "values of another width than keys": {"value_head_dim": 96},
    "block size of 8, only multiples of 16": {"block_size": 8},
    "scale of zero": {"scale": 0.0},
    "65 query heads a KV head": {"num_heads": 65, "num_kv_heads": 1},
    "an NVIDIA GPU, not on 'cpu'": {"device": "cpu"},
    "quantized KV cache for heads of 96, only of (64, 128, 256)": {
        **{"kv_dtype": "float8_e4m3fn", "head_dim": 96, "value_head_dim": 96},
    },
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED.keys())
def test_cuda_says_what_it_cannot_do(words: str, change: dict[str, object]) -> None:
    reason = CudaAttention.why_unsupported(served(**change))

    assert reason is not None
    assert words in reason


def test_cuda_shares_the_cache_of_triton() -> None:
    spec = served()

    assert CudaAttention.kv_layout(spec) == TritonAttention.kv_layout(spec)


@pytest.mark.parametrize(
    ("capability", "words"),
    [(None, "no NVIDIA GPU here"), ((7, 5), "compute capability 7.5; the kernels need 8.0")],
)
def test_machine_without_a_fit_gpu_is_told_why(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, words: str
) -> None:
    monkeypatch.setattr(library, "capability_here", lambda: capability)

    assert words in str(library.why_unusable())
    assert not library.is_built()
    with pytest.raises(BuildError, match=words):
        library.build(lambda line: None)


def test_only_hopper_gets_the_kernels_of_hopper() -> None:
    names = {
        capability: {source.path.name for source in library.library_for(capability).sources}
        for capability in [(8, 0), (9, 0), (12, 0)]
    }

    assert names[8, 0] == names[12, 0]
    assert {name for name in names[9, 0] if "hopper" in name} == names[9, 0] - names[8, 0] != set()
    assert all((library.FOLDER / name).exists() for name in names[9, 0])


# Between them they include every header.
COMPILED = {
    "sm_90a": ("prefill_hopper_128.cu", "plan.cu", "widen.cu", "heads_128_quantized.cu"),
    "sm_80": ("heads_64.cu", "heads_64_quantized.cu"),
}


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_sources_compile_without_spilling_registers(architecture: str, tmp_path: Path) -> None:
    base = library.library_for((9, 0) if architecture == "sm_90a" else (8, 0))
    assert base.architecture == architecture
    for name in COMPILED[architecture]:
        command = (*base.compiler.require(), *base.compiler.flags, *base.flags, "-Xptxas=-v")
        place = ("-c", str(library.FOLDER / name), "-o", str(tmp_path / "object"))

        said = library.native.compilers.run_compiler((*command, *place))

        # Nor are products waited for one by one, which the compiler would tell as C7510.
        assert "warning" not in said.lower(), said
        assert set(re.findall(r"(\d+) bytes spill stores", said)) <= {"0", "4"}, said


def test_lists_of_tiles_name_every_token_once_and_the_longest_context_first() -> None:
    cut = TileCut.of(served(), 64)
    spans = [(5, 6), (0, 70), (900, 905), (30, 62)]
    batch = make_batch(spans, [[1] * 99] * 4, 16)

    tiles = cut.list_of(batch)

    assert cut.step == 32
    assert tiles.tolist() == [[5, 0], [2, 0], [1, 64], [1, 32], [3, 0], [1, 0]]
    assert len(tiles) - 1 <= cut.most(1 + 70 + 5 + 32, 3)


@pytest.mark.parametrize("captured_for", [GraphSupport.NONE, GraphSupport.ANY])
def test_lists_of_steps_in_flight_lie_apart_and_captured_ones_at_one_place(
    captured_for: GraphSupport,
) -> None:
    lists = TileLists(TileCut.of(served(), 64), LIMITS, torch.device("cpu"))
    batch = make_batch([(0, 40)], [[1] * 9], 16)
    slots = range(LIMITS.max_steps_in_flight + 1)
    steps = [attrs.evolve(batch, in_flight_slot=i, captured_for=captured_for) for i in slots]

    found = [lists.upload(lists.cut.list_of(step), step) for step in steps]

    places = {tiles.data_ptr() for tiles in found}
    assert len(places) == (len(found) if captured_for is GraphSupport.NONE else 1)
    assert found[-1][:3].tolist() == [[2, 0], [0, 32], [0, 0]]


WIDE = {"device": "cpu", "kv_dtype": "float8_e4m3fn"}


def test_wide_blocks_are_those_that_the_prompts_of_a_step_see() -> None:
    blocks = WideBlocks(served(**WIDE), LIMITS, 128)
    batch = make_batch([(5, 6), (0, 33), (20, 48), (0, 16)], [[1] * 9] * 4, 16)

    plan = blocks.plan(batch)

    assert plan is not None
    wanted = [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2], [3, 0]]
    assert plan.blocks[: 1 + plan.num_blocks].tolist() == [[7, 0], *wanted]
    assert plan.num_tiles == 3
    assert blocks.table.shape[0] >= 4


def test_wide_blocks_begin_where_the_window_of_the_first_query_does() -> None:
    blocks = WideBlocks(served(**WIDE, sliding_window=20), LIMITS, 128)
    batch = make_batch([(51, 70), (52, 70)], [[1] * 9] * 2, 16)

    plan = blocks.plan(batch)

    assert plan is not None
    # The queries at 51 and 52 see from 32 and 33 on.
    wanted = [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]
    assert plan.blocks[1 : 1 + plan.num_blocks].tolist() == wanted


def test_wide_blocks_are_not_planned_for_a_capture_or_where_there_is_no_room() -> None:
    blocks = WideBlocks(served(**WIDE), attrs.evolve(LIMITS, max_model_len=64), 128)
    batch = make_batch([(0, 40)], [[1] * 9], 16)

    captured = attrs.evolve(batch, captured_for=GraphSupport.ANY)
    # As many blocks as tokens fit, and one more a sequence.
    room = (64 + LIMITS.max_num_batched_tokens) // 16 + LIMITS.max_num_seqs
    many = make_batch([(0, 16 * (room + 1))], [[1] * (room + 1)], 16)

    assert len(blocks.memory) == room
    assert blocks.plan(batch) is not None
    assert blocks.plan(captured) is None
    assert blocks.plan(many) is None


class RecordedLibrary:
    """Stands in for the compiled kernels and keeps the arguments of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any]]] = []

    def quire_attention_tile_rows(self, head_dim: int, kv_dtype: int) -> int:
        """Answer as the library for Hopper."""
        return 64 if kv_dtype else 128

    def __getattr__(self, name: str) -> Any:
        def launch(reference: Any, stream: int) -> int:
            fields = [field for field, _ in library.Arguments._fields_]
            values = {field: getattr(reference._obj, field) for field in fields}
            self.launches.append((name.removeprefix("quire_attention_"), values))
            return 0

        return launch


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedLibrary:
    """Let the backend run without a GPU, up to its launches."""
    found = RecordedLibrary()
    sms, stream = SimpleNamespace(multi_processor_count=4), SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sms)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(library, "load", lambda capability, with_hopper: found)
    return found


@pytest.mark.parametrize("is_captured", [False, True])
def test_prompts_of_a_quantized_cache_are_served_as_wide_unless_captured(
    recorded: RecordedLibrary, is_captured: bool
) -> None:
    spec = served(**WIDE)
    case = Case(spec=spec, lengths=((1, 20), (30, 70), (9, 9)))
    backend, batch = CudaAttention(spec, LIMITS, {}), step_batch(case)
    if is_captured:
        batch = attrs.evolve(batch, captured_for=GraphSupport.ANY)
    cache = torch.zeros(20, 2, 16, 128).to(torch.float8_e4m3fn)
    inputs = make_inputs(case)
    q, k, v = step_tensors(case, inputs)

    for _ in range(2):
        plan = backend.plan(batch, 0)
        backend.attend(make_layer(case, inputs), q, k, v, cache, plan, torch.empty_like(q))

    names = ["decode", "prefill"] if is_captured else ["decode", "widen", "prefill"]
    assert [name for name, _ in recorded.launches] == 2 * names
    for name, values in recorded.launches:
        wide = name == "prefill" and not is_captured
        own = backend._wide.memory if wide else cache
        table = backend._wide.table if wide else batch.groups[0].block_table
        assert values["cache"] == own.data_ptr()
        assert values["block_stride"] == own.stride(0)
        assert values["num_blocks"] == len(own)
        assert values["kv_dtype"] == (0 if wide else 1)
        assert (values["block_table"], values["table_stride"]) == (
            table.data_ptr(),
            table.stride(0),
        )
    last = recorded.launches[-1][1]
    # Tiles of 64 (token, head) rows, as many as there could be; or of 128, as many as there are.
    assert last["most_tiles"] == (-(-40 // 32) + 3 if is_captured else 2)


def gpu_test(function: Any) -> Any:
    """Mark a test that needs a GPU."""
    for mark in GPU:
        function = mark(function)
    return function


BOTH = pytest.mark.parametrize("backend", [CudaAttention, CudaWithoutHopper])
LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads of 128": {"head_dim": 128, "value_head_dim": 128, "num_heads": 8},
    "heads of 256": {"head_dim": 256, "value_head_dim": 256, "scale": 0.0625},
    "window and sinks": {"sliding_window": 300, "sinks": True, "dtype": "float16"},
    "soft cap": {"logit_softcap": 20.0, "block_size": 48},
    "group of 7": {"num_heads": 7, "num_kv_heads": 1, "block_size": 128},
    "fp8": {
        **{"kv_dtype": "float8_e4m3fn", "head_dim": 128, "value_head_dim": 128, "num_heads": 8},
    },
    "fp8, window and sinks": {
        **{"kv_dtype": "float8_e5m2", "dtype": "float16", "sliding_window": 300, "sinks": True},
    },
    "fp8, soft cap, heads of 256": {
        **{"kv_dtype": "float8_e4m3fn", "head_dim": 256, "value_head_dim": 256},
        **{"logit_softcap": 20.0, "num_heads": 40, "num_kv_heads": 2, "scale": 0.0625},
    },
    "group of 24": {"num_heads": 48, "num_kv_heads": 2, "head_dim": 96, "value_head_dim": 96},
}


@gpu_test
@BOTH
@pytest.mark.parametrize("name", LONG)
def test_long_contexts_and_chunks_are_within_the_bound(
    backend: type[AttentionBackend], name: str
) -> None:
    lengths = ((1, 1500), (1, 1), (1, 129), (300, 1100), (700, 700), (2, 1025), (129, 129))
    spec = served(**{"kv_dtype": LONG[name].get("dtype", "bfloat16"), **LONG[name]})
    case = Case(spec=spec, lengths=lengths, shared_blocks=2)
    inputs = make_inputs(case)

    check_within_bound(case, inputs, run(backend, case, inputs).out)


@gpu_test
def test_many_tiles_keep_every_block_of_the_grid_busy_in_order() -> None:
    """More tiles than blocks: queries and keys of one tile follow those of another."""
    lengths = tuple((40 + i % 50, 60 + 2 * i) for i in range(30))
    spec = served(num_heads=16, num_kv_heads=8)
    case = Case(spec=spec, lengths=lengths)
    inputs = make_inputs(case)
    limits = attrs.evolve(LIMITS, max_num_seqs=64)

    class Roomy(CudaAttention):
        def __init__(self, spec: Any, _limits: Any, options: Any) -> None:
            super().__init__(spec, limits, options)
            self._arguments.num_sms = 5

    check_within_bound(case, inputs, run(Roomy, case, inputs).out)


@gpu_test
def test_split_plan_covers_every_key_once_and_counters_come_back_to_zero() -> None:
    backend = CudaAttention(served(sliding_window=1000), LIMITS, {})
    seq_lens = [1, 5000, 64, 999, 2048, 0]
    batch = make_batch([(0, 1)] * 6, [[1]] * 6, 16, device="cuda")
    batch.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")

    backend.prepare(backend.plan(batch, 0))

    *firsts, num_items = backend._first_items[:7].tolist()
    items = backend._items[:num_items].tolist()
    assert num_items <= backend.max_items(6)
    assert sum(items[first][3] for first in firsts) == num_items
    for row, (first, seq_len) in enumerate(zip(firsts, seq_lens, strict=True)):
        own = items[first : first + items[first][3]]
        begin = max(0, seq_len - 1000) // 64 * 64
        assert [item[0] for item in own] == [row] * len(own)
        assert [item[1] for item in own] == [begin, *(item[2] for item in own[:-1])]
        assert own[-1][2] == seq_len
        assert {item[3] for item in own} == {len(own)}
    # Rows whose items are longest come first.
    assert firsts[1] < firsts[0] < firsts[5]
    assert backend._arrived.sum().item() == 0


@gpu_test
def test_buffers_are_counted_in_the_workspace() -> None:
    spec = served()
    backend = CudaAttention(spec, LIMITS, {})
    buffers = [x for x in vars(backend).values() if isinstance(x, Tensor)]

    held = sum(x.nbytes for x in [*buffers, backend._tiles.memory])

    assert held <= CudaAttention.workspace_bytes(spec, LIMITS)


@gpu_test
def test_tiles_of_the_longest_context_come_first() -> None:
    backend = CudaAttention(served(), LIMITS, {})
    step = backend.tile_rows // 2
    spans = [(5, 6), (0, 2 * step), (300, 305)]
    batch = make_batch(spans, [[1] * 99] * 3, 16, device="cuda")

    plan = backend.plan(batch, 0)

    # Their number comes first.
    assert (plan.num_single, plan.most_tiles) == (1, 3)
    assert plan.tiles[:4].tolist() == [[3, 0], [2, 0], [1, step], [1, 0]]


@gpu_test
@BOTH
def test_graph_of_any_step_serves_other_batches(backend: type[AttentionBackend]) -> None:
    lengths = ((1, 700), (1, 33), (1, 1), (2, 2), (7, 60), (200, 200), (40, 900))
    case = Case(spec=served(), lengths=lengths)
    graph = MixedGraphStep(Subject(backend=backend), case, make_inputs(case))

    for chosen in ([0, 1, 2, 3, 4, 5, 6], [1, 4], [5], [0, 2], [0, 1, 2, 6, 3]):
        part, inputs = graph.load(chosen)
        out = graph.replay().cpu()
        lens = [query_len for query_len, _ in part.lengths]
        check_within_bound(part, inputs, list(out[: sum(lens)].split(lens)))
        assert out[sum(lens) :].isnan().all()


@gpu_test
def test_plan_of_any_step_does_not_depend_on_the_batch() -> None:
    case = Case(spec=served(), lengths=((1, 70), (7, 33), (9, 9)))
    graph = MixedGraphStep(Subject(backend=CudaAttention), case, make_inputs(case))
    first = attrs.asdict(graph.backend.plan(graph.batch, 0), recurse=False)

    graph.load([0, 2])
    second = attrs.asdict(graph.backend.plan(graph.batch, 0), recurse=False)

    for name, value in first.items():
        other = second[name]
        same = isinstance(value, Tensor) and value.data_ptr() == other.data_ptr()
        assert same and value.shape == other.shape if isinstance(value, Tensor) else value == other


@gpu_test
def test_attention_without_a_cache_is_refused() -> None:
    backend = CudaAttention(served(), LIMITS, {})
    q = torch.zeros(1, 4, 64, device="cuda")

    with pytest.raises(KernelError, match="needs a KV cache"):
        backend.attend(Layer(), q, q, q, None, None, q)


@gpu_test
def test_failed_launch_is_told_in_the_words_of_the_runtime() -> None:
    backend = CudaAttention(served(), LIMITS, {})
    backend._arguments.head_dim = 72

    with pytest.raises(KernelError, match="invalid argument"):
        backend._call(backend._library.quire_attention_decode)
