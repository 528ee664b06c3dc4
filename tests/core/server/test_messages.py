"""Messages arrive as they were sent."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.request import FinishReason, Request, SamplingParams, SequenceUpdate, TokenLogprobs
from quire.server.messages import (
    Abort,
    Add,
    Stepped,
    StepStats,
    add_of,
    decode_from_engine,
    decode_to_engine,
    encode,
    request_of,
    update_of,
)

IDS = st.integers(0, 2**31 - 1)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 5),
        "top_p": st.floats(0.1, 1),
        "n": st.integers(1, 4),
        "stop": st.lists(st.text(min_size=1, max_size=5), max_size=3),
        "stop_token_ids": st.lists(IDS, max_size=3),
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), min_size=1, max_size=3),
        "logprobs": st.integers(0, 20),
        "repetition_penalty": st.floats(0.5, 2),
        "ignore_eos": st.booleans(),
        "allowed_token_ids": st.lists(IDS, min_size=1, max_size=3),
        "bad_words": st.just(["a", "b c"]),
        "truncate_prompt_tokens": st.sampled_from([-1, 9]),
        "extra_args": st.just({"watermark": {"gamma": 0.5}}),
    },
)


@given(st.lists(IDS, min_size=1, max_size=8), PARAMS, st.integers(0, 2**63 - 1), st.text())
def test_request_survives_the_way(
    token_ids: list[int], params: dict[str, Any], seed: int, salt: str
) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=token_ids,
        params=SamplingParams(**params),
        max_tokens=7,
        seed=seed,
        eos_token_ids=frozenset({2}),
        stop_token_ids=frozenset({3, 4}),
        bad_words_token_ids=((5,), (6, 7)),
        priority=-1,
        arrival_s=1.5,
        cache_salt=salt,
    )

    message = decode_to_engine(encode(add_of(request)))

    assert isinstance(message, Add)
    assert request_of(message, 1.5) == request


@given(
    st.lists(IDS, max_size=3),
    st.sampled_from([None, *FinishReason]),
    st.none() | IDS | st.text(),
    st.booleans(),
)
def test_update_survives_the_way(
    token_ids: list[int], reason: FinishReason | None, stop: int | str | None, scored: bool
) -> None:
    entry = TokenLogprobs(logprob=-0.5, rank=1, top_ids=(1, 2), top_logprobs=(-0.5, -1.0))
    update = SequenceUpdate(
        request_id="r",
        index=1,
        token_ids=tuple(token_ids),
        finish_reason=reason,
        stop_reason=stop,
        num_cached_tokens=3,
        logprobs=(entry,) if scored else None,
        prompt_logprobs=(None, entry) if scored else None,
    )

    message = decode_from_engine(encode(Stepped([update_of(update)], StepStats(), ["r"])))

    assert isinstance(message, Stepped)
    (found,) = message.updates
    names = ("request_id", "index", "token_ids", "finish_reason", "stop_reason", "error")
    names += ("num_cached_tokens", "logprobs", "prompt_logprobs")
    for name in names:
        assert getattr(found, name) == getattr(update, name), name


def test_messages_are_told_apart() -> None:
    assert decode_to_engine(encode(Abort(["a"]))) == Abort(["a"])
