"""The kit's doors to models: a function, a class to subclass in pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from attrs import evolve
from hypothesis import strategies as st

from quire.interfaces.model import Model
from quire.interfaces.model_config import ModelConfig
from quire.testing import model_checks as checks
from quire.testing import search
from quire.testing.kit_report import CheckResult, Failure, Profile, Report, profile_of
from quire.testing.model_cases import (
    ModelCase,
    ModelSubject,
    computes_whole,
    tiny_config,
    variations,
)
from quire.testing.model_oracle import why_missing
from quire.testing.used_weights import check_used

__all__ = ["ModelSubject", "ModelTests", "check_model", "iter_model"]

# Positions below this are in every tiny config.json.
LONGEST = 40
_TOP_K = "num_experts_per_tok"


@st.composite
def model_cases(
    draw: st.DrawFn,
    names: list[str],
    longest: int,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    least: int = 1,
    num_sequences: int = 1,
    whole: bool = False,
) -> ModelCase:
    """Draw so many sequences, or more, through one of the variations of config.json."""
    longest = min(longest, LONGEST)
    lengths = st.one_of(st.integers(least, longest), st.sampled_from([max(least, 1), longest]))
    return ModelCase(
        variation=draw(st.sampled_from(names)),
        lengths=tuple(draw(st.lists(lengths, min_size=num_sequences, max_size=3))),
        chunk=None if whole else draw(st.sampled_from([None, 1, 2, 3, 7])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
    )


def _with_every_expert(subject: ModelSubject) -> ModelSubject:
    """Return the subject with all experts for every token, where a config says how many.

    In half precision rounding alone may choose another expert, in the real class as here.
    """
    plain = tiny_config(subject)
    if _TOP_K not in plain:
        return subject
    if _TOP_K not in subject.made:
        every = plain.get("num_experts", plain.get("num_local_experts", plain[_TOP_K]))
        subject.made[_TOP_K] = evolve(subject, config={**subject.config, _TOP_K: every}, made={})
    found: ModelSubject = subject.made[_TOP_K]
    return found


def _checks(subject: ModelSubject, profile: Profile) -> list[search.Check]:
    # Before the real class: of keys that it does not know it makes one of its full size.
    subject.config_class.from_json(
        {"architectures": [subject.architecture], **tiny_config(subject)}
    )
    every = ["", *variations(subject)]
    longest = max(8, profile.longest)
    is_whole = computes_whole(subject)
    mixed = model_cases(every, longest, whole=is_whole)
    even = _with_every_expert(subject)
    names = ["", *(name for name, keys in variations(even).items() if _TOP_K not in keys)]
    half = model_cases(names, longest, dtypes=("bfloat16",), whole=is_whole)
    # A weight of attention may not matter to a token that sees itself alone.
    whole = model_cases(every, longest, least=8, whole=is_whole)
    several = model_cases(every, longest, num_sequences=2, whole=is_whole)
    plain = model_cases([""], longest, least=8, whole=is_whole)
    bits = model_cases(
        every, longest, dtypes=("float32", "bfloat16"), num_sequences=2, whole=is_whole
    )
    is_declared = subject.model.batch_invariant
    undeclared = None if is_declared else "batch_invariant is not declared"
    missing, narrow = why_missing(subject), checks.why_not_wide(subject)
    uncut = "an encoder computes a sequence whole" if is_whole else narrow

    def check(
        name: str,
        judge: Callable[[ModelSubject, ModelCase], Failure | None],
        cases: st.SearchStrategy[ModelCase],
        share: float,
        skipped: str | None = None,
        judged_on: ModelSubject = subject,
    ) -> search.Check:
        judged = partial(judge, judged_on)
        return search.Check(name=name, judge=judged, cases=cases, share=share, skipped=skipped)

    return [
        check("tensors", checks.check_tensors, mixed, 0.1),
        check("stages", checks.check_stages, mixed, 0.1),
        check("logits", checks.check_logits, mixed, 0.25, missing),
        check("half precision", checks.check_logits, half, 0.1, missing, even),
        check("weights used", check_used, whole, 0.1),
        check("keys honoured", checks.check_keys, plain, 0.1),
        check("batch", checks.check_batch, several, 0.1, narrow),
        check("chunks", checks.check_chunks, mixed, 0.1, uncut),
        check("batch invariance", checks.check_batch_invariance, bits, 0.05, undeclared),
        check("rows apart", checks.check_rows_apart, several, 0.05),
    ]


def iter_model(
    subject: ModelSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Iterator[CheckResult]:
    """Yield the result of each check of a model as it ends.

    Raises: ConfigError for an unknown profile, or a tiny config.json that the model refuses.
    """
    chosen = profile_of(profile)
    yield from search.run_all(_checks(subject, chosen), chosen, seed)


def check_model(
    subject: ModelSubject, *, profile: str | Profile = "quick", seed: int = 0
) -> Report:
    """Check a model and return the report, to the end or to the first failure.

    Raises: ConfigError for an unknown profile, or a tiny config.json that the model refuses.
    """
    report = Report(
        kind="model",
        name=subject.model.__name__,
        profile=profile_of(profile).name,
        device=subject.device,
        seed=seed,
        checks=[],
    )
    return search.report_of(iter_model(subject, profile=profile, seed=seed), report)


class ModelTests(search.KitTests):
    """Subclass this in a test file, name the model, and pytest runs every check.

    `architecture` is the claim; where Transformers has a class of that name it is the judge, or
    the class that `oracle` names. `config` changes the tiny config.json that the kit makes of
    the keys in `config_class`.
    """

    model: ClassVar[type[Model]]
    config_class: ClassVar[type[ModelConfig]]
    architecture: ClassVar[str]
    config: ClassVar[Mapping[str, Any]] = {}
    oracle: ClassVar[str | None] = None
    _made: ClassVar[dict[type, ModelSubject]] = {}

    def _checks(self) -> list[search.Check]:
        own = type(self)
        if own not in self._made:
            # What one test makes of the real class the next one need not make again.
            self._made[own] = ModelSubject(
                model=self.model,
                config_class=self.config_class,
                architecture=self.architecture,
                config=self.config,
                device=self.device,
                oracle=self.oracle,
            )
        return _checks(self._made[own], self.profile)

    def test_every_tensor_of_a_checkpoint_has_its_place(self) -> None:
        """And every parameter is filled."""
        self._check("tensors")

    def test_stages_give_what_the_contract_says(self) -> None:
        """Shapes, dtypes, wanted rows, the same bits again."""
        self._check("stages")

    def test_logits_are_those_of_the_real_class(self) -> None:
        """Where Transformers has it."""
        self._check("logits")

    def test_logits_in_half_precision_are_those_of_the_real_class(self) -> None:
        """Where Transformers has it."""
        self._check("half precision")

    def test_every_weight_changes_the_logits(self) -> None:
        """Of the checkpoint."""
        self._check("weights used")

    def test_every_key_changes_the_logits(self) -> None:
        """Of those that the model declares."""
        self._check("keys honoured")

    def test_prompt_in_chunks_equals_the_whole(self) -> None:
        """However its steps are cut."""
        self._check("chunks")

    def test_sequence_is_the_same_alone_and_in_a_batch(self) -> None:
        """As near as float32."""
        self._check("batch")

    def test_bits_are_the_same_alone_and_in_a_batch(self) -> None:
        """Where `batch_invariant` is declared; also however steps are cut."""
        self._check("batch invariance")

    def test_nan_in_one_sequence_does_not_reach_the_others(self) -> None:
        """In one step."""
        self._check("rows apart")
