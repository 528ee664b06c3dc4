"""What the kit draws, prints and refuses; test_broken_backends.py has what it catches."""

from __future__ import annotations

import subprocess
import sys
import unittest
from itertools import combinations
from typing import Any

import attrs
import pytest
import torch
from broken_backends import TailUnmasked
from broken_plans import FusedGather
from gather_attention import GatherAttention
from hypothesis import given, settings

from quire.errors import ConfigError
from quire.interfaces.attention import AttentionSpec, GraphSupport, LatentSpec
from quire.testing import AttentionBackendTests, check_attention
from quire.testing.attention_cases import Case, make_inputs, make_spec, make_tables, num_shared
from quire.testing.attention_run import Subject, run
from quire.testing.attention_strategies import cases, choices_of, specs
from quire.testing.dense import attention
from quire.testing.diagnosis import MISTAKES, explain
from quire.testing.graph_steps import GraphStep
from quire.testing.kit import PROFILES


class TestGather(AttentionBackendTests):
    backend = GatherAttention


class TestFusedGather(AttentionBackendTests):
    backend = FusedGather
    specs = (make_spec(), make_spec(dtype="bfloat16", num_heads=6))


def choices():
    found = choices_of(Subject(backend=GatherAttention), "cpu")
    assert not isinstance(found, str)
    return found


@given(cases(specs(choices()), longest=70))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_cases_are_of_what_the_backend_serves_with_single_tokens_first(case: Case) -> None:
    assert GatherAttention.why_unsupported(case.spec) is None
    assert all(1 <= query_len <= seq_len <= 70 for query_len, seq_len in case.lengths)
    assert list(case.lengths) == sorted(case.lengths, key=lambda pair: pair[0] > 1)
    tables, num_blocks = make_tables(case)
    own = [table[num_shared(case, i) if i else 0 :] for i, table in enumerate(tables)]
    used = [block for table in own for block in table]
    assert len(used) == len(set(used))
    assert all(0 < block < num_blocks for block in used)


def test_shared_blocks_hold_the_same_tokens() -> None:
    case = Case(spec=make_spec(), lengths=((1, 10), (3, 20)), shared_blocks=2)

    tables, _ = make_tables(case)
    inputs = make_inputs(case)

    assert tables[0][:2] == tables[1][:2]
    assert tables[0][2] != tables[1][2]
    assert torch.equal(inputs.k[0][:8], inputs.k[1][:8])


def test_case_is_told_in_words() -> None:
    spec = make_spec(sliding_window=3, sinks=True, num_heads=6)
    case = Case(spec=spec, lengths=((1, 7), (3, 3)), shared_blocks=1, padding=2, strided=False)

    assert str(case) == (
        "sequences of 1 new token after 6, 3 new tokens after 0; blocks of 4; "
        "6 heads over 2 KV heads of 16; float32; scale 0.25; window 3; sinks; 1 shared blocks; "
        "2 padding rows; q, k, v contiguous; seed 0"
    )


def test_same_seed_finds_the_same_failure() -> None:
    patient = attrs.evolve(PROFILES["quick"], seconds=60, shrink_s=60)

    found = [check_attention(TailUnmasked, profile=patient, seed=7) for _ in range(2)]

    assert found[0].checks[-1].detail == found[1].checks[-1].detail != ""


RICH = Case(
    spec=make_spec(sliding_window=6, logit_softcap=1.5, sinks=True, num_heads=6),
    lengths=((1, 9), (1, 18), (5, 14)),
    poison="zero",
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.words)
def test_each_known_mistake_explains_itself_alone(mistake) -> None:
    case = RICH
    if mistake.words == "there is no causal mask":
        # Within a window nothing else looks like it.
        case = attrs.evolve(case, spec=attrs.evolve(case.spec, sliding_window=None))
    if mistake.kv_scales != "own":
        case = attrs.evolve(case, spec=attrs.evolve(case.spec, kv_dtype="float8_e4m3fn"))
    if mistake.without_rotated or mistake.values_at_end:
        sizes = LatentSpec(kv_lora_rank=12, rope_head_dim=4, nope_head_dim=8, v_head_dim=8)
        changes = {"num_kv_heads": 1, "head_dim": 16, "value_head_dim": 12, "latent": sizes}
        case = attrs.evolve(case, spec=attrs.evolve(case.spec, **changes))
    if mistake.without_alibi:
        case = attrs.evolve(case, spec=attrs.evolve(case.spec, alibi=True))
    inputs = make_inputs(case)
    wrong = attention(case, inputs, torch.float64, mistake)

    assert explain(case, inputs, [out.float() for out in wrong]) == mistake.words


def test_right_outputs_have_no_explanation() -> None:
    inputs = make_inputs(RICH)

    assert explain(RICH, inputs, run(GatherAttention, RICH, inputs).out) is None


def test_known_mistakes_have_words_of_their_own() -> None:
    assert all(one.words != other.words for one, other in combinations(MISTAKES, 2))


class ServesNothing(GatherAttention):
    @classmethod
    def why_unsupported(cls, spec: AttentionSpec) -> str | None:
        return "it needs a moon"


def test_backend_that_serves_nothing_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="on cpu: it needs a moon"):
        check_attention(ServesNothing)


def test_unknown_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match="profile is 'slow'; allowed: quick, full"):
        check_attention(GatherAttention, profile="slow")


class OnCuda(AttentionBackendTests):
    backend = GatherAttention
    device = "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tests_for_cuda_are_skipped_without_one() -> None:
    with pytest.raises(unittest.SkipTest, match="no CUDA device"):
        OnCuda().test_each_slot_has_memory_of_its_own()


def without(module: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which a module is not installed."""
    hidden = f"import sys; sys.modules[{module!r}] = None; {program}"
    return subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)


def test_missing_hypothesis_names_the_extra() -> None:
    program = "from quire.cli.main import main; sys.exit(main(['plugins', 'check', 'sdpa']))"

    done = without("hypothesis", program)

    assert done.returncode == 2
    assert done.stderr == (
        "quire: error: quire.testing needs hypothesis, which is not installed; "
        "pip install 'quire[testing]'.\n"
    )


def test_kit_works_without_pytest() -> None:
    program = "import quire.testing; print(quire.testing.AttentionBackendTests.__name__)"

    assert without("pytest", program).stdout == "AttentionBackendTests\n"


def test_captured_step_of_single_tokens_says_what_it_is_captured_for() -> None:
    case = Case(spec=make_spec(), lengths=((1, 9), (1, 4)), padding=1)

    step = GraphStep(Subject(backend=GatherAttention), case, make_inputs(case))

    assert step.batch.captured_for is GraphSupport.SINGLE_TOKEN


class CopiesTheCache(GatherAttention):
    """Right, and would take all memory of a machine where a cache is large."""

    def gathered(self, cache: Any, *rest: Any) -> Any:
        return super().gathered(cache.double(), *rest)


class CopiesHalves(GatherAttention):
    """The same in one dtype alone."""

    def gathered(self, cache: Any, *rest: Any) -> Any:
        return super().gathered(cache.double() if self.spec.dtype == "float16" else cache, *rest)


def test_backend_that_copies_the_whole_cache_passes_without_a_large_one() -> None:
    report = check_attention(CopiesTheCache)

    assert report.passed
    assert "is the whole cache copied?" in report.checks[-1].detail
    assert check_attention(CopiesHalves).passed


def test_backend_that_exits_fails() -> None:
    """The kit would end without a word, with the backend's own status."""

    class Exits(GatherAttention):
        def attend(self, *_: Any, **__: Any) -> None:
            raise SystemExit(0)

    report = check_attention(Exits)
    assert not report.passed
    assert "raises SystemExit: 0" in report.checks[0].detail
