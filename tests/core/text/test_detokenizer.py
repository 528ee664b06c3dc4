"""Text given out token by token equals the text of all tokens, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.text.detokenizer import IncrementalDetokenizer
from quire.text.tokenizer import Tokenizer

RELAXED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
random_ids = st.lists(st.integers(0, 450), max_size=40)
# Ids around the byte tokens of the byte-fallback kinds and the raw bytes of byte-level ones.
byte_ids = st.lists(st.integers(2, 270), max_size=40)
any_ids = random_ids | byte_ids
cuts = st.lists(st.integers(0, 40), max_size=8)


def oracle(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], skips: bool) -> str:
    """Return decode(prompt + ids) without the beginning shared with decode(prompt)."""
    before = tokenizer.decode(prompt, skips)
    whole = tokenizer.decode([*prompt, *ids], skips)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(shared)) :]


def pieces(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    return [ids[a:b] for a, b in pairwise(bounds)]


def stream(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    chunks: Sequence[Sequence[int]],
    *,
    skips: bool = True,
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skips)
    return [*map(detokenizer.push, chunks), detokenizer.finish()]


@RELAXED
@given(prompt=any_ids, ids=any_ids, cuts=cuts, skips=st.booleans())
def test_streamed_text_equals_decode_of_all_ids_for_any_ids_and_cuts(
    prompt: list[int], ids: list[int], cuts: list[int], skips: bool, tokenizer: Tokenizer
) -> None:
    texts = stream(tokenizer, prompt, pieces(ids, cuts), skips=skips)

    assert "".join(texts) == oracle(tokenizer, prompt, ids, skips)


@RELAXED
@given(data=st.binary(min_size=60, max_size=200), shift=st.integers(0, 250), ids=any_ids)
def test_a_long_prompt_of_which_only_the_ends_are_read_changes_nothing(
    data: bytes, shift: int, ids: list[int], tokenizer: Tokenizer
) -> None:
    prompt = [byte + shift for byte in data]
    assert "".join(stream(tokenizer, prompt, [ids])) == oracle(tokenizer, prompt, ids, True)


@pytest.mark.parametrize("text", ["你好世界", "🙂👍🏽🇩🇪", "naïve café", "Größe"])
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2", "llama2", "mistral", "gemma"])
def test_no_push_gives_half_a_character(
    text: str, kind: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("a" + text, add_special_tokens=False)

    texts = stream(tokenizer, [], [[token_id] for token_id in ids])

    assert "\ufffd" not in "".join(texts)
    assert text in "".join(texts)


@pytest.mark.parametrize("num_prompt", range(12))
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma"])
def test_a_prompt_cut_inside_a_character_gives_no_prompt_text(
    num_prompt: int, kind: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("hi 🦉🦔🦊", add_special_tokens=False)
    prompt, output = ids[:num_prompt], ids[num_prompt:]

    text = "".join(stream(tokenizer, prompt, [[token_id] for token_id in output]))

    assert text == oracle(tokenizer, prompt, output, True)
    assert "hi 🦉🦔🦊".endswith(text)


@pytest.mark.parametrize("kind", ["llama2", "mistral", "unigram"])
def test_the_space_between_prompt_and_output_is_kept(
    kind: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    output = tokenizer.encode("world", add_special_tokens=False)

    assert "".join(stream(tokenizer, prompt, [output])) == " world"
    assert "".join(stream(tokenizer, [], [output])) == "world"


def test_each_character_is_given_as_soon_as_it_is_complete(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer.encode("🦉", add_special_tokens=False)

    texts = stream(tokenizer, [], [[token_id] for token_id in ids])

    assert texts == [*[""] * (len(ids) - 1), "🦉", ""]


def test_a_run_of_byte_tokens_waits_for_its_end_since_one_bad_byte_spoils_it(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("gemma")
    owl = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🦉".encode()]
    bad, letter = tokenizer.token_to_id("<0xFF>"), tokenizer.token_to_id("a")

    assert stream(tokenizer, [], [owl, [letter]]) == ["", "🦉a", ""]
    assert stream(tokenizer, [], [owl, [bad]]) == ["", "\ufffd" * 5, ""]


def test_a_long_run_of_byte_tokens_does_not_stall_the_stream(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("gemma")
    owls = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in ("🦉" * 100).encode()]

    texts = stream(tokenizer, [], [[token_id] for token_id in owls])

    assert "".join(texts) == "🦉" * 100
    assert max(map(len, texts)) <= 16


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "wordpiece"])
def test_a_stream_holds_a_bounded_number_of_ids(
    kind: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = sum(len(detokenizer.push([i % 200 + 20])) for i in range(3000))

    assert shown + len(detokenizer.finish()) >= shown > 2000
    assert len(detokenizer._stream.peek()) < 100


def test_special_tokens_are_shown_when_asked_for(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("llama3")
    ids = tokenizer.encode("hi<|eot_id|>")

    assert "".join(stream(tokenizer, [], [ids], skips=False)) == "<|begin_of_text|>hi<|eot_id|>"
    assert "".join(stream(tokenizer, [], [ids])) == "hi"


def test_ids_without_a_token_add_nothing(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, [], [[10**6, 2**31 - 1]])) == ""


@RELAXED
@given(prompt=any_ids, ids=any_ids, cuts=cuts)
def test_special_tokens_are_joined_whatever_the_cuts(
    prompt: list[int], ids: list[int], cuts: list[int], tokenizer: Tokenizer
) -> None:
    specials = sorted(tokenizer.added_token_ids)[:2]
    ids = [specials[i % len(specials)] if i % 3 else i for i in ids]

    def text(chunks: Sequence[Sequence[int]]) -> str:
        detokenizer = IncrementalDetokenizer(
            tokenizer, prompt, False, spaces_between_special_tokens=False
        )
        return "".join([*map(detokenizer.push, chunks), detokenizer.finish()])

    assert text(pieces(ids, cuts)) == text([ids])


@pytest.mark.parametrize(("joins", "gap"), [(True, ""), (False, " ")])
@pytest.mark.parametrize("kind", ["words", "wordpiece"])
def test_spaces_between_special_tokens_are_the_decoders_or_none(
    kind: str, joins: bool, gap: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    first, second = sorted(tokenizer.added_token_ids)[:2]
    (word,) = tokenizer.encode("coffee", add_special_tokens=False)
    a, b = tokenizer.id_to_token(first), tokenizer.id_to_token(second)

    detokenizer = IncrementalDetokenizer(
        tokenizer, [word], False, spaces_between_special_tokens=not joins
    )
    text = detokenizer.push([first, second, second, word, first]) + detokenizer.finish()

    assert text == f" {a}{gap}{b}{gap}{b} coffee {a}"


@pytest.mark.parametrize("skips", [True, False])
def test_skipped_special_tokens_are_not_joined(
    skips: bool, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of("gpt2")
    ids = tokenizer.encode("hello <|endoftext|><|endoftext|> there")

    detokenizer = IncrementalDetokenizer(tokenizer, [], skips, spaces_between_special_tokens=False)

    assert detokenizer.push(ids) + detokenizer.finish() == tokenizer.decode(ids, skips)
