"""Any mix of all sampling parameters in one batch: each request is answered as it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from attrs import asdict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import OPTIONS, has_all_blocks

from quire import LLM, SamplingParams
from quire.errors import RequestError

END = 256
TOKEN = st.integers(97, 122)
WORDS = st.lists(st.sampled_from(["a", "th", "e!", " the", "zq"]), max_size=2)
FORMS: list[dict[str, Any]] = [
    {"regex": "[a-f]{3}-[0-9]{2}"},
    {"choice": ["yes", "no", "may be"]},
    {"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
]
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.8]),
        "seed": st.integers(0, 2**40),
        "max_tokens": st.integers(1, 14),
    },
    optional={
        "n": st.integers(1, 3),
        "top_k": st.sampled_from([1, 3, 40, -1]),
        "top_p": st.sampled_from([0.2, 0.9]),
        "min_p": st.sampled_from([0.02, 0.3]),
        "repetition_penalty": st.sampled_from([0.5, 1.4]),
        "frequency_penalty": st.sampled_from([-1.0, 0.7]),
        "presence_penalty": st.sampled_from([-0.5, 1.5]),
        "logit_bias": st.dictionaries(TOKEN, st.sampled_from([-100.0, 4.0]), max_size=3),
        "min_tokens": st.integers(0, 6),
        "stop": st.lists(st.sampled_from(["a", "bc"]), max_size=1),
        "stop_token_ids": st.lists(TOKEN, max_size=2),
        "ignore_eos": st.booleans(),
        "bad_words": WORDS,
        "forbidden_token_ids": st.lists(TOKEN, max_size=3),
        "logprobs": st.integers(0, 4),
        "prompt_logprobs": st.integers(0, 2),
        "truncate_prompt_tokens": st.integers(1, 8),
        "best_of": st.integers(3, 4),
        "structured_outputs": st.sampled_from(FORMS),
        "allowed_token_ids": st.lists(TOKEN, min_size=5, max_size=12, unique=True),
        "extra_args": st.sampled_from([{"watermark": True}, {"watermark": {"key": 5, "delta": 4}}]),
    },
)


def params_of(given: dict[str, Any]) -> SamplingParams | None:
    """Return the parameters, None where they contradict one another."""
    if "structured_outputs" in given:
        # Else mostly no token is left.
        given = {k: v for k, v in given.items() if k not in ("allowed_token_ids", "bad_words")}
    try:
        return SamplingParams(**given)
    except RequestError:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write_folder(folder, vocab_size=260, eos_token_id=END)
    return tiny_llama.write_tokenizer(folder)


@pytest.fixture(scope="module", params=[2048, 24])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    options = {**OPTIONS, "skip_tokenizer_init": False, "attention_backend": "reference"}
    options |= {"deterministic": True, "logits_processors": ["watermark"]}
    llm = LLM(str(folder), **options, max_num_batched_tokens=request.param, max_model_len=64)
    yield llm
    llm.frontend.close()


def ask(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> list[Any]:
    """Return what there is to compare of each answer, or of its error."""
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        answers = [asdict(answer) for answer in output.outputs]
        found.append((output.prompt_token_ids, output.prompt_logprobs, answers))
    return found


STORY = st.tuples(st.sampled_from(["hello", "the quick brown fox jumps", "a", "the quic"]), PARAMS)


@pytest.mark.filterwarnings("ignore:.*forbid every token that its form allows")
@given(st.lists(STORY, min_size=2, max_size=9))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_each_request_of_a_mix_is_answered_as_alone(llm: LLM, stories: list[Any]) -> None:
    given = [(prompt, params_of(own)) for prompt, own in stories]
    checked = []
    for prompt, params in given:
        try:
            if params is not None:
                llm.frontend.inputs.process(prompt, params, request_id="probe")
                checked.append((prompt, params))
        except RequestError:
            continue
    prompts, params = [one for one, _ in checked], [own for _, own in checked]

    together = ask(llm, prompts, params) if checked else []

    assert together == [ask(llm, [one], [own])[0] for one, own in checked]
    assert has_all_blocks(llm.engine)
