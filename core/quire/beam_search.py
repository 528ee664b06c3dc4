"""What is asked of a beam search, and what it answers. Names follow vLLM's offline API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import asdict, field, frozen

from quire.errors import RequestError, shown

if TYPE_CHECKING:
    from quire.request import Logprob

MAX_BEAM_WIDTH = 128
MAX_LENGTH_PENALTY = 10.0

EarlyStopping = bool | Literal["never"]


def _refuse(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name} is {shown(value)}; allowed: {allowed}.", parameter=name)


def _width(_instance: object, attribute: Any, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_BEAM_WIDTH:
        raise _refuse(attribute.name, value, f"whole numbers from 1 to {MAX_BEAM_WIDTH}")


def _penalty(_instance: object, attribute: Any, value: Any) -> None:
    bound = MAX_LENGTH_PENALTY
    if type(value) not in (int, float) or not -bound <= value <= bound:
        raise _refuse(attribute.name, value, f"numbers from {-bound:g} to {bound:g}")


def _early(_instance: object, attribute: Any, value: Any) -> None:
    if type(value) is not bool and value != "never":
        raise _refuse(attribute.name, value, 'true, false or "never"')


@frozen(kw_only=True)
class BeamOptions:
    """How a request is searched, in `SamplingParams.beam_search`.

    `beam_width` beams go on side by side. A sequence's score is its log-probability, divided by
    its number of generated tokens, the end token included, to the power of `length_penalty`.
    `early_stopping` True ends when as many sequences are done; False when the best running beam
    as it stands scores less than they do; "never" when no length could make it score more.
    Source: the meaning is that of Transformers' `generate`.
    """

    beam_width: int = field(validator=_width)
    length_penalty: float = field(default=1.0, validator=_penalty)
    early_stopping: EarlyStopping = field(default=False, validator=_early)


def to_beam_options(value: Any) -> Any:
    """Return options that came as a mapping, over a socket or from a user."""
    if value is None or isinstance(value, BeamOptions):
        return value
    names = ("beam_width", "length_penalty", "early_stopping")
    if not isinstance(value, Mapping) or not {"beam_width"} <= set(value) <= set(names):
        raise _refuse("beam_search", value, f"a mapping of {', '.join(names)}; the first is needed")
    return BeamOptions(**value)


@frozen
class BeamSearchParams:
    """How `LLM.beam_search` searches: vLLM's fields, and Transformers' `early_stopping`.

    A sequence's score counts its generated tokens alone, as Transformers does. `temperature` is 0
    or 1: the model's own probabilities. Raises: RequestError, naming the field.
    """

    beam_width: int = field(validator=_width)
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = field(default=1.0, validator=_penalty)
    include_stop_str_in_output: bool = False
    early_stopping: EarlyStopping = field(default=False, validator=_early)

    def sampling_values(self) -> dict[str, Any]:
        """Return the arguments of the SamplingParams that ask for the same."""
        given = asdict(self)
        names = ("beam_width", "length_penalty", "early_stopping")
        options = BeamOptions(**{name: given.pop(name) for name in names})
        return {**given, "n": self.beam_width, "logprobs": 0, "beam_search": options}


@frozen(kw_only=True)
class BeamSearchSequence:
    """One sequence that a search found.

    `tokens` begin with the prompt's, and `text` with its text, as in vLLM; the end token is in
    them only with `include_stop_str_in_output`. `logprobs` has one dict a generated token, the
    end token included, and `cum_logprob` is their sum. `score` is what sequences are ranked by.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    score: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@frozen
class BeamSearchOutput:
    """What a search found for one prompt, best first."""

    sequences: list[BeamSearchSequence]
