"""Whether every tensor of a checkpoint changes the logits."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.layers.places import Place, places
from quire.testing.kit_report import Failure
from quire.testing.model_cases import ModelCase, ModelSubject
from quire.testing.model_checks import ready_of, sequences_of
from quire.testing.model_oracle import logits_of, oracle_of, why_missing
from quire.testing.model_run import Ready, ready

# Tokens of a sequence in which some have each expert.
LONG = 40


def check_used(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """Every tensor of the checkpoint changes the logits."""
    found = ready_of(subject, case)
    sequences = sequences_of(case, found)
    before = found.logits(sequences)
    generator = torch.Generator().manual_seed(case.seed)
    for name, place in places(found.model).items():
        view = place.view()
        kept = view.clone()
        view.add_(torch.randn(view.shape, generator=generator).to(view))
        _rebind(found)
        after = found.logits(sequences)
        matters = not torch.equal(before, after)
        if not matters and place.expert is not None:
            matters = _serves_a_token(subject, case, found.model, place, kept)
            found = ready(subject, found.model, case.lengths)
        view.copy_(kept)
        matters = matters or _is_idle(subject, case, name, sequences)
        if not matters:
            what = f"{name} may be anything: the logits do not depend on it"
            return Failure(what=what, case=case, guess="it is loaded and never used")
    return None


def _is_idle(subject: ModelSubject, case: ModelCase, name: str, sequences: list[list[int]]) -> bool:
    """Answer whether the real class does not depend on a weight, either: a bias of keys may not."""
    real = None
    if why_missing(subject) is None:
        real = oracle_of(subject, case.variation, case.weights)
    named = {} if real is None else dict(real.named_parameters())
    weight = named.get(name, named.get(subject.model.weight_names.base + name))
    if weight is None:
        return False
    before, kept = logits_of(real, sequences), weight.data.clone()
    weight.data.add_(1.0)
    after = logits_of(real, sequences)
    weight.data.copy_(kept)
    return torch.allclose(before, after, rtol=1e-4, atol=1e-5)


def _serves_a_token(
    subject: ModelSubject, case: ModelCase, model: Model, place: Place, kept: Tensor
) -> bool:
    """Answer whether an expert's weight matters to other sequences, if not to those of the case.

    It is not as `kept` says, and stays so.
    """
    view = place.view()
    changed = view.clone()
    for more in range(1, 9):
        longer = evolve(case, lengths=(LONG, LONG), seed=case.seed + more)
        found = ready(subject, model, longer.lengths)
        after = found.logits(sequences_of(longer, found))
        view.copy_(kept)
        _rebind(found)
        before = found.logits(sequences_of(longer, found))
        view.copy_(changed)
        if not torch.equal(before, after):
            return True
    return False


def _rebind(found: Ready) -> None:
    """Let attention layers look at their weights again."""
    for layer in found.model.modules():
        if isinstance(layer, Attention):
            layer.bind(layer.backend, layer.kv_cache, layer.group)
