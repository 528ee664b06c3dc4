"""The kit passes a right model, catches every broken one, and says what is wrong."""

from __future__ import annotations

import sys

import pytest
from attrs import evolve
from broken_models import BROKEN, SAYS
from small_decoder import SmallConfig, SmallDecoder

from quire.testing import ModelTests, check_model
from quire.testing.kit_model import ModelSubject
from quire.testing.kit_report import PROFILES, Report
from quire.testing.model_cases import variations
from quire.testing.model_mistakes import MISTAKES
from quire.testing.model_oracle import explain, logits_of, oracle_of

# As many cases on a slow machine as on a fast one, and few: a model is dear to make.
PATIENT = evolve(PROFILES["quick"], seconds=60, examples=60, longest=20, least=4)
# Oracles that are made once for all models.
MADE: dict = {}


def subject_of(model: type[SmallDecoder], architecture: str = "LlamaForCausalLM") -> ModelSubject:
    made = MADE if architecture == "LlamaForCausalLM" else {}
    return ModelSubject(model=model, config_class=SmallConfig, architecture=architecture, made=made)


def failure_of(report: Report) -> str:
    failed = [check for check in report.checks if check.outcome == "failed"]
    assert len(failed) == 1, "it passed"
    return f"{failed[0].name}: {failed[0].detail}"


class TestSmall(ModelTests):
    model = SmallDecoder
    config_class = SmallConfig
    architecture = "LlamaForCausalLM"
    profile = PATIENT


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_is_caught(name: str) -> None:
    report = check_model(subject_of(BROKEN[name]), profile=PATIENT)

    failure = failure_of(report)
    print(failure)
    assert SAYS[name] in failure


# What no real class is needed for.
ALONE = {
    "eps-fixed": "a key is declared and not honoured",
    "another-rope-base": "config.json with rope_theta 20 gives the same logits",
    "layers-of-one-name": "has two places",
    "norm-weight-never-used": "the logits do not depend on it",
    "positions-of-the-step": "depend on how a step is cut",
    "mean-of-the-batch": "sequences of a batch are mixed",
}


@pytest.mark.parametrize("name", ALONE)
def test_broken_model_is_caught_without_a_real_class(name: str) -> None:
    report = check_model(subject_of(BROKEN[name], "Stranger"), profile=PATIENT)

    assert ALONE[name] in failure_of(report)


def test_model_without_a_real_class_passes_and_is_told_so() -> None:
    report = check_model(subject_of(SmallDecoder, "Stranger"), profile=PATIENT)

    assert report.passed, failure_of(report)
    skipped = {check.name: check.detail for check in report.checks if check.outcome == "skipped"}
    assert skipped["logits"] == "transformers has no class Stranger"


def test_missing_transformers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    subject = evolve(subject_of(SmallDecoder), made={})

    report = check_model(subject, profile=evolve(PATIENT, examples=4, least=2))

    [logits] = [check for check in report.checks if check.name == "logits"]
    assert logits.outcome == "skipped"
    assert "pip install 'transformers>=5'" in logits.detail


def test_variations_are_of_the_keys_that_a_model_declares() -> None:
    found = variations(subject_of(SmallDecoder))

    assert {"rope_theta 20", "tied embeddings", "another rms_norm_eps"} <= set(found)
    assert "attention_bias true" in found
    assert not any("sliding" in name or "head_dim" in name for name in found)


SEQUENCES = [list(range(1, 15)), [3, 4]]


@pytest.mark.parametrize("name", ["", "another rms_norm_eps", "rope_theta 20"])
def test_right_logits_have_no_explanation(name: str) -> None:
    subject = subject_of(SmallDecoder)
    out = logits_of(oracle_of(subject, name, 0), SEQUENCES)

    assert explain(subject, name, 0, SEQUENCES, out) is None


def test_known_mistakes_have_words_of_their_own() -> None:
    words = [one for one, _ in MISTAKES]

    assert len(set(words)) == len(words)


def test_case_is_told_in_words() -> None:
    report = check_model(subject_of(BROKEN["attention-not-scaled"]), profile=PATIENT)

    assert "case: sequences of " in failure_of(report)
