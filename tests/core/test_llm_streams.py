"""Several things at once on one LLM: each gets all that is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama

from quire import LLM, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tiny_llama.write_folder(tmp_path_factory.mktemp("tiny"), vocab_size=256)
    return LLM(str(folder), num_threads=1, max_num_seqs=8, kv_cache_memory_bytes=1 << 24)


def params(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def test_a_stream_goes_on_after_a_generate_in_between(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], params(12))
    first = next(stream)

    (other,) = llm.generate([[4, 5]], params(5), use_tqdm=False)
    rest = list(stream)

    assert len(other.outputs[0].token_ids) == 5
    assert sum(len(delta.token_ids) for delta in [first, *rest]) == 12
    assert rest[-1].finish_reason == "length"


def test_two_streams_give_each_all_its_tokens(llm: LLM) -> None:
    one, two = llm.stream([1, 2], params(9)), llm.stream([3], params(4))
    begin = [next(one), next(two)]

    ones, twos = [begin[0], *one], [begin[1], *two]

    assert sum(len(delta.token_ids) for delta in ones) == 9
    assert sum(len(delta.token_ids) for delta in twos) == 4
    assert llm.engine.block_manager.usage == 0
