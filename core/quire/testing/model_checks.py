"""What must hold of a model: one function a check, which judges one case."""

from __future__ import annotations

import copy
import re

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.model import Model
from quire.layers.attention import Attention
from quire.layers.places import places
from quire.testing.bound import bound, first_beyond, same_bits, unit_of
from quire.testing.kit_report import Failure
from quire.testing.model_cases import (
    ModelCase,
    ModelSubject,
    draw_sequences,
    given_by,
    variations,
)
from quire.testing.model_oracle import explain, logits_of, oracle_of, tensors_of, why_missing
from quire.testing.model_run import (
    Ready,
    build,
    doubled_names,
    draw_weights,
    given_json,
    load,
    ready,
    tied_names,
)
from quire.testing.pooling_stages import check_pooling_stages, fields_of

CUT = "positions, or what is kept of earlier tokens, depend on how a step is cut"


def _tensors(subject: ModelSubject, case: ModelCase) -> dict[str, Tensor] | None:
    """Return the checkpoint of the real class; None where there is none: weights are drawn."""
    if why_missing(subject) is not None:
        return None
    return tensors_of(subject, case.variation, case.weights)


def _model(
    subject: ModelSubject,
    case: ModelCase,
    *,
    dtype: str | None = None,
    weights: dict[str, Tensor] | None = None,
    batch_invariant: bool = False,
) -> Model:
    """Return the model of a case with its weights."""
    given = _tensors(subject, case) if weights is None else weights
    name = getattr(torch, dtype or case.dtype)
    config = given_json(subject, case.variation)
    model = build(subject, config, name, batch_invariant=batch_invariant)
    load(model, draw_weights(model, case.weights) if given is None else given)
    return model


def ready_of(subject: ModelSubject, case: ModelCase, *, dtype: str | None = None) -> Ready:
    """Return the model of a case with its weights and a cache."""
    return ready(subject, _model(subject, case, dtype=dtype), case.lengths)


def sequences_of(case: ModelCase, found: Ready) -> list[list[int]]:
    """Return the token ids of a case."""
    return draw_sequences(case, found.vocab_size)


def _in_words(case: ModelCase, wrong: str, *, scored: bool = False) -> str:
    """Turn `token 7` of all tokens into a sequence and its position; scores have no position."""
    row, of_token = int(wrong.split(",")[0].split()[1]), wrong.partition(", ")[2]
    if scored:
        return f"sequence {row}, {of_token}"
    sequence = 0
    while row >= case.lengths[sequence]:
        row -= case.lengths[sequence]
        sequence += 1
    return f"sequence {sequence}, position {row}, {of_token}"


def check_tensors(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """Every tensor of a checkpoint has one place, and every parameter is filled."""
    tensors = _tensors(subject, case)
    model = build(subject, given_json(subject, case.variation), torch.float32)
    doubled = doubled_names(model)
    if doubled:
        guess = "two layers were given the same name: a layer's number may be missing in it"
        return Failure(what=f"{doubled[0]} has two places", case=case, guess=guess)
    indices = [m.index for m in model.modules() if isinstance(m, Attention)]
    again = [index for index in indices if indices.count(index) > 1]
    if again:
        what = f"{len(again)} attention layers have layer_index {again[0]}"
        return Failure(what=what, case=case, guess="layer_index must count the layers")
    patterns = model.weight_names.ignored
    needed = [n for n in places(model) if any(re.fullmatch(p, n) for p in patterns)]
    if needed:
        what = f"{needed[0]} is ignored and has a place; `weight_names.ignored` is too wide"
        return Failure(what=what, case=case)
    if tensors is not None:
        wrong = _judge_names(subject, case, model, tensors)
        if wrong is not None:
            return wrong
    load(model, draw_weights(model, case.seed) if tensors is None else tensors)
    for name, parameter in model.named_parameters():
        if bool(parameter.isnan().any()):
            what = f"parameter {name} is not filled, or in part: no tensor has its place there"
            return Failure(what=what, case=case)
    return None


def _judge_names(
    subject: ModelSubject, case: ModelCase, model: Model, tensors: dict[str, Tensor]
) -> Failure | None:
    names = load(model, tensors)
    for words, found in (
        ("is wanted, and the real class has no such tensor", names.missing),
        ("of the real class has no place, and is not ignored", names.unexpected),
        ("", names.wrong),
    ):
        if found:
            return Failure(what=f"{found[0]} {words}".rstrip(), case=case)
    real = oracle_of(subject, case.variation, case.weights)
    patterns, tied = model.weight_names.ignored, tied_names(model)
    if given_by(subject) == "vectors":
        return None  # the real class has a pooler that nobody reads
    computed = {*dict(real.named_parameters()), *tensors} - set(dict(real.named_buffers()))
    for name in sorted(computed - tied):
        if any(re.fullmatch(p, name) for p in patterns):
            what = f"{name} is ignored, and the real class computes with it"
            return Failure(what=what, case=case, guess="weights of a layer are never loaded")
    return None


def check_logits(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """Logits err at most twice as much as those of the real class in the same dtype."""
    seed = case.weights
    real = oracle_of(subject, case.variation, seed)
    if real is None:
        return None
    dtype = getattr(torch, case.dtype)
    # Weights that the dtype holds exactly, so that only the computation differs.
    written = tensors_of(subject, case.variation, seed) or {}
    tensors = {name: tensor.to(dtype) for name, tensor in written.items()}
    found = ready(subject, _model(subject, case, weights=tensors), case.lengths)
    sequences = sequences_of(case, found)
    out = found.logits(sequences, case.chunk)
    plain, exact_model = _of_dtype(subject, case, dtype)
    exact = logits_of(exact_model, sequences)
    if out.shape != exact.shape or out.dtype != dtype:
        shapes = f"{out.dtype} {list(out.shape)} instead of {dtype} {list(exact.shape)}"
        return Failure(what=f"the logits are {shapes}", case=case)

    def plain_error(rounds: int) -> float:
        worst = 0.0
        for more in range(rounds):
            drawn = draw_sequences(evolve(case, seed=case.seed + 7919 * more), found.vocab_size)
            right = exact if not more else logits_of(exact_model, drawn)
            for chunk in {None, case.chunk}:
                error = (logits_of(plain, drawn, chunk).double() - right).abs().max().item()
                worst = max(worst, error)
        return worst

    error = (out.double() - exact).abs().max().item()
    allowed = bound(error, unit_of(dtype, exact), plain_error)
    wrong = first_beyond(out, exact, allowed, ("token", "logit"))
    if wrong is None:
        return None
    if case.chunk is not None:
        out = ready(subject, found.model, case.lengths).logits(sequences)
        if bool(((out.double() - exact).abs() <= allowed).all()):
            return Failure(what=_in_words(case, wrong.words), case=case, guess=CUT)
    guess = explain(subject, case.variation, seed, sequences, out)
    words = _in_words(case, wrong.words, scored=found.gives == "scores")
    return Failure(what=words, case=case, guess=guess)


def _of_dtype(subject: ModelSubject, case: ModelCase, dtype: torch.dtype) -> tuple:
    """Return the real class in a dtype, and in float64 with the same weights."""
    key = ("narrow", case.variation, case.weights, dtype)
    if key not in subject.made:
        plain = copy.deepcopy(oracle_of(subject, case.variation, case.weights)).to(dtype)
        subject.made[key] = plain, copy.deepcopy(plain).double()
    pair: tuple = subject.made[key]
    return pair


def check_keys(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """A key that is declared changes the logits, unless the real class says that it does not."""
    plain = _model(subject, evolve(case, variation=""))
    shapes = {name: place.view().shape for name, place in places(plain).items()}
    weights = {name: place.view().clone() for name, place in places(plain).items()}
    before = ready(subject, plain, case.lengths)
    sequences = sequences_of(case, before)
    real = why_missing(subject) is None
    for variation in variations(subject):
        other = evolve(case, variation=variation)
        if real and not _matters(subject, case, variation, sequences):
            continue
        model = build(subject, given_json(subject, variation), torch.float32)
        if {name: place.view().shape for name, place in places(model).items()} != shapes:
            continue
        load(model, weights)
        after = ready(subject, model, case.lengths).logits(sequences)
        if torch.equal(after, before.logits(sequences)):
            what = f"config.json with {variation} gives the same logits as without"
            return Failure(what=what, case=other, guess="a key is declared and not honoured")
    return None


def _matters(
    subject: ModelSubject, case: ModelCase, variation: str, sequences: list[list[int]]
) -> bool:
    """Answer whether a variation changes what the real class computes with the same weights."""
    seed = case.weights
    plain, other = (oracle_of(subject, name, seed) for name in ("", variation))
    if plain is None or other is None:
        return False
    given = plain.state_dict()
    if {n: t.shape for n, t in given.items()} != {
        n: t.shape for n, t in other.state_dict().items()
    }:
        return False
    kept = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    other.load_state_dict(given)
    changed = logits_of(other, sequences)
    other.load_state_dict(kept)
    return not torch.equal(changed, logits_of(plain, sequences))


def _near(subject: ModelSubject, case: ModelCase, whole: Tensor) -> float:
    """Return by how much float32 changes the logits of all sequences in one step."""
    narrow = ready_of(subject, case, dtype="float32")
    error = (narrow.logits(sequences_of(case, narrow)).double() - whole).abs().max().item()
    return 2 * error + unit_of(torch.float32, whole)


def _compared(
    subject: ModelSubject, case: ModelCase, out: Tensor, whole: Tensor, guess: str
) -> Failure | None:
    """Compare logits of a float64 model with those of all sequences in one step."""
    wrong = first_beyond(out, whole, _near(subject, case, whole), ("token", "logit"))
    if wrong is None:
        return None
    scored = len(out) == len(case.lengths) < sum(case.lengths)
    return Failure(what=_in_words(case, wrong.words, scored=scored), case=case, guess=guess)


def why_not_wide(subject: ModelSubject) -> str | None:
    """Return why the model cannot be run in float64, where two ways to run it are told apart."""
    case = ModelCase(lengths=(2,))
    try:
        ready_of(subject, case, dtype="float64").logits([[1, 2]])
    except Exception as error:  # noqa: BLE001 - whatever a model raises
        text = " ".join(str(error).split())
        return f"it does not run in float64 ({type(error).__name__}: {text[:120]})"
    return None


def check_chunks(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """A prompt in several steps gives the logits of the prompt in one."""
    case = evolve(case, chunk=case.chunk or 3)
    whole = ready_of(subject, case, dtype="float64")
    sequences = sequences_of(case, whole)
    exact = whole.logits(sequences)
    out = ready(subject, whole.model, case.lengths).logits(sequences, case.chunk)
    return _compared(subject, case, out, exact, CUT)


def check_batch(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """A sequence gives the same logits alone and in a batch."""
    together = ready_of(subject, case, dtype="float64")
    sequences = sequences_of(case, together)
    out, alone = together.logits(sequences), []
    for i, sequence in enumerate(sequences):
        model = ready(subject, together.model, [case.lengths[i]])
        alone.append(model.logits([sequence]))
    return _compared(subject, case, torch.cat(alone), out, "sequences of a batch are mixed")


def check_batch_invariance(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """A token's logits have the same bits alone, in a batch, and however steps are cut."""
    model = _model(subject, case, batch_invariant=True)
    together = ready(subject, model, case.lengths)
    sequences = sequences_of(case, together)
    out = together.logits(sequences)
    guess = "something between the layers is computed otherwise for another number of tokens"
    for chunk in {1, case.chunk or 3}:
        if not same_bits(ready(subject, model, case.lengths).logits(sequences, chunk), out):
            what = f"in steps of {chunk} tokens a sequence has other bits than in one"
            return Failure(what=what, case=case, guess=guess)
    alone = [
        ready(subject, model, [length]).logits([sequence])
        for length, sequence in zip(case.lengths, sequences, strict=True)
    ]
    if same_bits(torch.cat(alone), out):
        return None
    return Failure(what="a sequence has other bits alone than in a batch", case=case, guess=guess)


def check_rows_apart(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """A NaN in one sequence does not reach another."""
    found = ready_of(subject, case)
    sequences = sequences_of(case, found)
    batch = found.step([(i, 0, n) for i, n in _in_order(case)], sequences)
    bad = case.seed % len(batch.query_lens)
    model = found.model
    with torch.inference_mode():
        hidden = model.embed(batch.token_ids).clone()
        first = sum(batch.query_lens[:bad])
        own = range(first, first + batch.query_lens[bad])
        hidden[own.start : own.stop] = float("nan")
        reached = found.outputs(model(hidden, batch), batch).isnan().any(1).tolist()
    own = range(bad, bad + 1) if found.gives == "scores" else own
    others = [token for token, is_nan in enumerate(reached) if is_nan and token not in own]
    if not others:
        return None
    what = f"a NaN in the embeddings of tokens {own[0]} to {own[-1]} reaches token {others[0]}"
    return Failure(what=what, case=case, guess="something is summed over all tokens of a step")


def _in_order(case: ModelCase) -> list[tuple[int, int]]:
    """Return number and length of each sequence, those of one token first."""
    return sorted(enumerate(case.lengths), key=lambda pair: pair[1] > 1)


def check_stages(subject: ModelSubject, case: ModelCase) -> Failure | None:
    """The stages give what the contract says, change nothing, and give it again."""
    found, model_dtype = ready_of(subject, case), getattr(torch, case.dtype)
    sequences = sequences_of(case, found)
    batch = found.step([(i, 0, n) for i, n in _in_order(case)], sequences)
    if found.gives != "logits":
        return check_pooling_stages(case, found, batch)
    num_tokens, size = len(batch.token_ids), found.model.config.hidden_size
    everything = found.forward(batch)
    wanted = torch.tensor(sorted({0, num_tokens - 1, num_tokens // 2}), dtype=torch.int32)
    batch.logit_rows = wanted.to(subject.device)
    kept = {name: tensor.clone() for name, tensor in fields_of(batch).items()}
    with torch.inference_mode():
        hidden = found.model.embed(batch.token_ids)
        last = found.model(hidden.clone(), batch)
        rows = last if len(last) != num_tokens else last[wanted.long()]
        logits = found.model.logits(rows)
    shapes = {
        "embed": (hidden, [num_tokens, size]),
        "forward": (last, [len(last) if len(last) == num_tokens else len(wanted), size]),
        "logits": (logits, [len(wanted), found.vocab_size]),
    }
    for name, (tensor, shape) in shapes.items():
        if list(tensor.shape) != shape or tensor.dtype != model_dtype:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            return Failure(what=f"{name} gives {got} instead of {model_dtype} {shape}", case=case)
    changed = [
        name for name, tensor in fields_of(batch).items() if not same_bits(kept[name], tensor)
    ]
    if changed:
        return Failure(what=f"batch.{changed[0]} was changed; nobody may", case=case)
    wide = first_beyond(
        logits.cpu(),
        everything[wanted.long()].double().cpu(),
        64 * unit_of(model_dtype, everything.double()),
        ("wanted row", "logit"),
    )
    if wide is not None:
        guess = "rows_to_keep is not in the order of logit_rows"
        return Failure(what=f"wanted rows alone: {wide.words}", case=case, guess=guess)
    if not same_bits(found.forward(batch), found.forward(batch)):
        return Failure(what="the same step twice gives other bits", case=case)
    return None
