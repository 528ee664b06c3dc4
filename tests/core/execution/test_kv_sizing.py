"""The KV cache never exceeds the memory or what the sequences can use, and refusals help."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.execution.kv_sizing import KVRequest, size_kv_cache
from quire.preparation import _may_have_windows
from quire.scheduling.output import KVCacheGroup


@st.composite
def requests(draw: st.DrawFn, wanted: st.SearchStrategy) -> KVRequest:
    return KVRequest(
        available_bytes=draw(st.one_of(st.integers(-(10**6), 10**4), st.integers(0, 10**12))),
        bytes_per_block=draw(st.integers(1, 10**7)),
        block_size=2 ** draw(st.integers(0, 12)),
        max_num_seqs=draw(st.integers(1, 65536)),
        wanted_len=draw(wanted),
        model_len=draw(st.integers(1, 2**30)),
    )


ANY_LENGTH = st.one_of(st.none(), st.just("auto"), st.integers(1, 2**30))


def blocks_for(length: int, request: KVRequest) -> int:
    return -(-length // request.block_size)


def size_or_none(request: KVRequest):
    try:
        return size_kv_cache(request)
    except ConfigError:
        return None


@given(requests(ANY_LENGTH))
def test_blocks_fit_in_the_memory_and_in_what_the_sequences_can_use(request: KVRequest) -> None:
    size = size_or_none(request)
    if size is None:
        return

    assert size.num_blocks * request.bytes_per_block <= request.available_bytes
    full = blocks_for(size.max_model_len, request)
    assert size.num_blocks <= request.max_num_seqs * full + 1
    # One whole sequence fits beside block 0.
    assert size.num_blocks >= full + 1
    # Nothing is left unused that some sequence could use.
    bigger = size.num_blocks + 1
    assert (
        bigger * request.bytes_per_block > request.available_bytes
        or bigger > request.max_num_seqs * full + 1
    )


@given(requests(st.just("auto")))
def test_auto_is_the_largest_length_that_fits(request: KVRequest) -> None:
    size = size_or_none(request)
    if size is None:
        assert request.available_bytes < 2 * request.bytes_per_block
        return

    assert size.max_model_len <= request.model_len
    longer = size.max_model_len + 1
    need = (blocks_for(longer, request) + 1) * request.bytes_per_block
    assert longer > request.model_len or need > request.available_bytes
    reason = "the model's own" if size.max_model_len == request.model_len else "the largest"
    assert size.why.startswith(reason)


@given(requests(st.one_of(st.none(), st.integers(1, 2**30))))
def test_explicit_length_is_honoured_or_refused(request: KVRequest) -> None:
    wanted = request.model_len if request.wanted_len is None else request.wanted_len

    size = size_or_none(request)

    fits = (blocks_for(wanted, request) + 1) * request.bytes_per_block <= request.available_bytes
    assert (size is not None) == fits
    if size is not None:
        assert size.max_model_len == wanted


@given(requests(st.one_of(st.none(), st.integers(1, 2**30))))
def test_numbers_in_the_refusal_would_do(request: KVRequest) -> None:
    from attrs import evolve

    try:
        size_kv_cache(request)
    except ConfigError as error:
        message = str(error)
    else:
        return
    length = re.search(r"Use --max-model-len (\d+)", message)
    memory = re.search(r"--kv-cache-memory-bytes (\d+)", message)
    if length is None or memory is None:
        assert "no KV block fits" in message
        return

    assert size_kv_cache(evolve(request, wanted_len=int(length[1]))).max_model_len == int(length[1])
    assert size_kv_cache(evolve(request, available_bytes=int(memory[1])))
    with pytest.raises(ConfigError):
        size_kv_cache(evolve(request, wanted_len=int(length[1]) + 1))
    with pytest.raises(ConfigError):
        size_kv_cache(evolve(request, available_bytes=int(memory[1]) - 1))


@pytest.mark.parametrize("available", [-5, 0, 1999])
def test_memory_for_less_than_two_blocks_is_refused_with_the_remedy(available: int) -> None:
    request = KVRequest(
        available_bytes=available,
        bytes_per_block=1000,
        block_size=16,
        max_num_seqs=4,
        wanted_len="auto",
        model_len=64,
    )

    with pytest.raises(ConfigError, match=r"no KV block fits.*--kv-cache-memory-bytes"):
        size_kv_cache(request)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"hidden_size": 8}, False),
        ({"sliding_window": 4096}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 4096, "max_window_layers": 9, "use_sliding_window": False}, False),
        ({"text_config": {"sliding_window": 512}}, True),
        ({"text_config": 3}, False),
    ],
)
def test_length_is_refused_early_only_where_no_layer_may_have_a_window(
    raw: dict[str, object], expected: bool
) -> None:
    assert _may_have_windows(raw) is expected


@given(st.integers(2, 400), st.integers(1, 64), st.integers(1, 40), st.integers(1, 30))
def test_longest_length_with_windows_is_the_longest_that_fits(
    slabs: int, window: int, step: int, layers: int
) -> None:
    groups = tuple(
        KVCacheGroup(
            layers=(0,),
            block_size=4,
            bytes_per_block=1,
            num_blocks=2,
            window=own,
            blocks_per_slab=count,
        )
        for own, count in ((None, 1 + layers % 5), (window, 1))
    )
    request = KVRequest(
        available_bytes=slabs * 10,
        bytes_per_block=10,
        block_size=4,
        max_num_seqs=3,
        wanted_len="auto",
        model_len=1000,
        groups=groups,
        max_step_tokens=step,
    )
    size = size_or_none(request)
    if size is None:
        assert request.blocks_for(1) > slabs - 1
        return

    assert size.a_sequence == request.blocks_for(size.max_model_len) <= slabs - 1
    longer = size.max_model_len + 1
    assert longer > 1000 or request.blocks_for(longer) > slabs - 1
