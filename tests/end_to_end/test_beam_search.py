"""Beam search in float32 finds the sequences and scores of Transformers' `generate`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attrs import frozen
from transformers import PreTrainedModel

from quire import LLM, BeamSearchParams, SamplingParams
from quire.errors import RequestError

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")

VOCAB = 101
NUM_NEW = 12
MAX_LEN = 48
EOS = 7
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Every second layer sees less than a block of some cases.
WINDOWS: dict[str, dict[str, Any]] = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
}
# Two numbers are a tie where float32 cannot tell them apart.
TOLERANCE = 2e-5
# How many of the vocabulary's tokens end a sequence: it does so early, late or never.
NUM_ENDS = (20, 3, 0)

Found = list[tuple[list[int], float]]


@frozen
class Case:
    """How a prompt is searched."""

    prompt: list[int]
    width: int
    length_penalty: float
    early_stopping: Any
    ends: list[int]
    min_tokens: int = 0

    def params(self) -> SamplingParams:
        return SamplingParams(
            n=self.width,
            max_tokens=NUM_NEW,
            min_tokens=self.min_tokens,
            ignore_eos=True,
            stop_token_ids=self.ends,
            logprobs=0,
            detokenize=False,
            beam_search={
                "beam_width": self.width,
                "length_penalty": self.length_penalty,
                "early_stopping": self.early_stopping,
            },
        )


@frozen
class Checkpoint:
    """A saved model, the real class, and what its `generate` finds for each case."""

    folder: Path
    oracle: PreTrainedModel
    cases: list[Case]
    expected: list[Found]


def make_oracle(family: str) -> PreTrainedModel:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**SIZES, **WINDOWS.get(family, {}))
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, 0.25).add_(1.0 if "norm" in name else 0.0)
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def generate(oracle: PreTrainedModel, case: Case, max_tokens: int = NUM_NEW) -> Found:
    """Return the generated tokens, the end token included, and the scores."""
    given = torch.tensor([case.prompt])
    options: dict[str, Any] = {}
    if case.width > 1:
        options = {"length_penalty": case.length_penalty, "early_stopping": case.early_stopping}
    if case.min_tokens:
        options["min_new_tokens"] = case.min_tokens
    found = oracle.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=case.width,
        num_return_sequences=case.width,
        eos_token_id=case.ends or -1,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    sequences = [cut(tokens, case) for tokens in found.sequences.tolist()]
    if case.width > 1:
        return list(zip(sequences, found.sequences_scores.tolist(), strict=True))
    steps = zip(found.scores, sequences[0], strict=True)
    total = sum(float(scores[0].log_softmax(-1)[token_id]) for scores, token_id in steps)
    return [(sequences[0], total / len(sequences[0]) ** case.length_penalty)]


def cut(tokens: list[int], case: Case) -> list[int]:
    """Return what was generated, without padding behind the end token."""
    new = tokens[len(case.prompt) :]
    ends = [i for i, token_id in enumerate(new) if token_id in case.ends]
    return new[: ends[0] + 1] if ends else new


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(11)
    penalties, early = (-1.0, 0.0, 1.0, 2.0), (False, True, "never")
    grid = itertools.product((1, 2, 4, 8), penalties, early)
    cases = []
    for number, (width, penalty, stopping) in enumerate(grid):
        length = int(torch.randint(1, 30, (1,), generator=generator))
        ids = torch.randperm(VOCAB, generator=generator).tolist()
        count = NUM_ENDS[(number + number // 3) % 3]
        ends = sorted(ids[VOCAB - count :])
        least = (0, 0, 1, 4)[number % 4] if width > 1 else 0
        cases.append(Case(ids[:length], width, penalty, stopping, ends, least))
    return cases


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Qwen2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    oracle = make_oracle(request.param)
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    cases = make_cases()
    return Checkpoint(folder, oracle, cases, [generate(oracle, case) for case in cases])


SETUPS: dict[str, dict[str, Any]] = {
    "room for all": {"block_size": 16, "max_num_seqs": 64, "max_num_batched_tokens": 2048},
    "chunks of 9, blocks of 1": {
        "block_size": 1,
        "max_num_seqs": 9,
        "max_num_batched_tokens": 9,
    },
    "preempted": {
        "block_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 32,
        "num_cached_tokens": 200,
    },
    "preempted without a prefix cache": {
        "block_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16,
        "num_cached_tokens": 180,
        "enable_prefix_caching": False,
    },
}


def make_llm(checkpoint: Checkpoint, num_cached_tokens: int = 4096, **options: Any) -> LLM:
    config = checkpoint.oracle.config
    head_dim = getattr(config, "head_dim", None) or 8
    token_bytes = 4 * 2 * SIZES["num_hidden_layers"] * SIZES["num_key_value_heads"] * head_dim
    size = options.get("block_size", 16)
    if config.model_type == "qwen2" and num_cached_tokens < 1000:
        num_cached_tokens = num_cached_tokens * 9 // 10  # windows need less
        options["max_num_seqs"] *= 2
    return LLM(
        str(checkpoint.folder),
        dtype="float32",
        device="cpu",
        attention_backend="sdpa",
        num_threads=1,
        max_model_len=options.pop("max_model_len", MAX_LEN),
        kv_cache_memory_bytes=token_bytes * (num_cached_tokens + size),
        **options,
    )


def difference(found: Found, expected: Found) -> str:
    """Return what is wrong, or nothing."""
    if len(found) != len(expected):
        return f"{len(found)} sequences instead of {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        is_near = abs(ours[1] - theirs[1]) <= TOLERANCE * max(1.0, abs(theirs[1]))
        if not is_near:
            return f"sequence {i}: {ours} instead of {theirs}"
        if ours[0] != theirs[0] and all(ours[0] != tokens for tokens, _ in expected):
            return f"sequence {i}: {ours} instead of {theirs}, a tie"
    return ""


def scored(completion: Any, length_penalty: float) -> tuple[list[int], float]:
    tokens = list(completion.token_ids)
    return tokens, completion.cumulative_logprob / len(tokens) ** length_penalty


@pytest.mark.parametrize("name", SETUPS)
def test_sequences_and_scores_equal_transformers(checkpoint: Checkpoint, name: str) -> None:
    llm = make_llm(checkpoint, **SETUPS[name])
    plain = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
    prompts, params = [], []
    for case in checkpoint.cases:
        prompts += [{"prompt_token_ids": case.prompt}, {"prompt_token_ids": case.prompt[::-1]}]
        params += [case.params(), plain]

    outputs = llm.generate(prompts, params, use_tqdm=False)

    wrong = []
    for case, expected, output in zip(
        checkpoint.cases, checkpoint.expected, outputs[::2], strict=True
    ):
        found = [scored(completion, case.length_penalty) for completion in output.outputs]
        why = difference(found, expected)
        wrong += [f"{case}: {why}"] if why else []
    assert wrong == []
    alone = make_llm(checkpoint).generate(prompts[1::2], plain, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs[1::2]] == [
        o.outputs[0].token_ids for o in alone
    ]
    assert llm.engine.block_manager.num_used_blocks == 0
    assert (llm.engine.scheduler.num_preemptions > 0) is ("preempted" in name)


def test_ends_come_early_late_and_never(checkpoint: Checkpoint) -> None:
    lengths = [
        {len(tokens) for tokens, _ in found if tokens[-1] in case.ends}
        for case, found in zip(checkpoint.cases, checkpoint.expected, strict=True)
    ]
    met = set().union(*lengths)

    assert {1, 2} & met, "early"
    assert max(met) >= NUM_NEW // 2, "late"
    assert set() in lengths, "never"


def test_search_ends_with_the_context(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint, max_model_len=20)
    case = Case(checkpoint.cases[-1].prompt[:15] or [1], 4, 1.0, "never", [3])
    room = 20 - len(case.prompt)

    [output] = llm.generate([{"prompt_token_ids": case.prompt}], case.params(), use_tqdm=False)

    expected = generate(checkpoint.oracle, case, min(room, NUM_NEW))
    assert difference([scored(c, 1.0) for c in output.outputs], expected) == ""


def test_beam_search_returns_what_vllm_names(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint)
    prompt = checkpoint.cases[0].prompt
    params = BeamSearchParams(beam_width=4, max_tokens=NUM_NEW)

    found = llm.beam_search([{"prompt_token_ids": prompt}, prompt], params, concurrency_limit=1)

    expected = generate(checkpoint.oracle, Case(prompt, 4, 1.0, False, [EOS]))
    assert found[0] == found[1]
    for sequence, (tokens, score) in zip(found[0].sequences, expected, strict=True):
        ended = tokens[-1] == EOS
        assert sequence.tokens == prompt + (tokens[:-1] if ended else tokens)
        assert sequence.score == pytest.approx(score, rel=TOLERANCE)
        assert sequence.cum_logprob == pytest.approx(score * len(tokens), rel=TOLERANCE)
        assert len(sequence.logprobs) == len(tokens)
        assert sequence.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("presence_penalty", 1.0), ("repetition_penalty", 1.2), ("seed", 3), ("stop", ["x"])),
        *(("logit_bias", {3: 1.0}), ("top_p", 0.5), ("top_k", 4), ("min_p", 0.1)),
        *(("temperature", 0.7), ("prompt_logprobs", 0), ("n", 3)),
    ],
)
def test_what_a_search_does_not_do_is_refused(
    checkpoint: Checkpoint, field: str, value: Any
) -> None:
    given: dict[str, Any] = {"beam_search": {"beam_width": 2}, field: value}

    with pytest.raises(RequestError) as error:
        make_llm(checkpoint).frontend.inputs.process(
            [1, 2], SamplingParams(**given), request_id="r"
        )

    assert error.value.parameter == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("beam_width", 0), ("beam_width", 129), ("beam_width", True), ("beam_width", 60)),
        *(("length_penalty", 11), ("length_penalty", float("nan")), ("early_stopping", "often")),
        *(("max_tokens", 0), ("temperature", 0.7)),
    ],
)
def test_wrong_parameters_are_refused_by_name(
    checkpoint: Checkpoint, field: str, value: Any
) -> None:
    given: dict[str, Any] = {"beam_width": 2, "max_tokens": 4, field: value}
    llm = make_llm(checkpoint, max_num_seqs=50)

    with pytest.raises(RequestError) as error:
        llm.beam_search([[1, 2]], BeamSearchParams(**given))

    assert error.value.parameter == field
    assert not llm.engine.has_unfinished()
