"""What must hold of a quantization method's layers: one function a check, which judges one case."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as functional
from attrs import evolve, frozen
from torch import Tensor

from quire.interfaces.quantization import LinearSpec
from quire.testing.bound import bound, first_beyond, leave_poison, same_bits, unit_of
from quire.testing.kit_report import Failure
from quire.testing.quantization_cases import (
    LayerCase,
    Loaded,
    QuantizationSubject,
    held_bytes,
    make_input,
    make_layer,
    spec_of,
    stored_bits,
)

AXES = ("row", "output")
# Of so many seeds one has its layer called twice.
CALLED_ONCE = 4


@frozen(kw_only=True)
class Expected:
    """What a layer must multiply with, and how far each weight may be off: [out, in] and [out]."""

    weight: Tensor
    slack: Tensor


def rounding_of(subject: QuantizationSubject, loaded: Loaded, case: LayerCase) -> float:
    """Return the largest error of a weight as a fraction of its projection's largest.

    Without a declared one: half a step of the format that the weight is kept in.
    """
    if subject.rounding is not None:
        return subject.rounding
    if loaded.is_exact:
        return 0.0
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    kept = [p.dtype for p in loaded.layer.parameters(recurse=False) if p.dim() > 1]
    floats = [torch.finfo(d).eps for d in kept if d.is_floating_point and d.itemsize == 1]
    if floats:
        return floats[0] / 2 + eps
    num_bits = max(2, int(stored_bits(loaded.layer)))
    return 0.5 / (2 ** (min(num_bits, 16) - 1) - 1) + eps


def by_part(per_part: Sequence[float], case: LayerCase, device: str) -> Tensor:
    """Return [out]: the number of each output's projection."""
    sizes = torch.tensor(case.sizes)
    return torch.tensor(per_part, dtype=torch.float64).repeat_interleave(sizes).to(device)


def expected_of(subject: QuantizationSubject, loaded: Loaded, case: LayerCase) -> Expected:
    """Return what the layer must multiply with: what it reads back, or what it was given."""
    found = loaded.method.dequantize(loaded.layer)
    if found is not None:
        return Expected(weight=found.double(), slack=by_part([0.0] * len(case.sizes), case, "cpu"))
    rounding = rounding_of(subject, loaded, case)
    largest = [part.abs().max().item() for part in loaded.exact.split(case.sizes)]
    slack = by_part([rounding * value for value in largest], case, subject.device)
    return Expected(weight=loaded.exact, slack=slack)


@frozen(kw_only=True)
class _Plain:
    """The whole product in plain PyTorch, of which `part` is looked at."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    part: slice

    def errors(self, exact: Tensor, rounds: int) -> float:
        """Return the worst error in the dtype of x, in several orders of addition."""
        generator = torch.Generator().manual_seed(0)
        narrow, worst = self.weight.to(self.x.dtype), 0.0
        for _ in range(3 * rounds):
            order = torch.randperm(self.x.shape[1], generator=generator).to(self.x.device)
            plain = functional.linear(self.x[:, order], narrow[:, order], self.bias)[:, self.part]
            worst = max(worst, (plain.double() - exact).abs().max().item())
        return worst


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b in float64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def check_product(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """The product is within the bound, of the right kind, and nothing else is changed."""
    failure = _judge_call(subject, case)
    if failure is None or not case.unusual:
        return failure
    usual = _judge_call(subject, evolve(case, unusual=""))
    guess = f"{case.unusual} is what makes it wrong" if usual is None else failure.guess
    return evolve(failure, guess=guess)


def _judge_call(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    loaded = make_layer(subject, subject.make(), case)
    if loaded is None:
        return None
    x = make_input(case, subject.device)
    kept = x.clone()
    leave_poison(case.rows, sum(case.sizes), dtype=x.dtype, device=subject.device)
    out = loaded.layer(x)
    first = out.clone()
    failure = _judge_shape(case, out, x.dtype) or judge_product(subject, case, loaded, kept, out)
    if failure is not None:
        return failure
    if not same_bits(x, kept):
        return Failure(what="x was changed; a layer may only read it", case=case)
    if case.seed % CALLED_ONCE or case.kind == "embedding":
        return None
    other = make_input(evolve(case, seed=case.seed + 1), subject.device) * 4
    failure = judge_product(subject, case, loaded, other, loaded.layer(other))
    if failure is None and not same_bits(out, first):
        what = "the result of the first call changes with the second: results share memory"
        return Failure(what=what, case=case)
    guess = "something is kept from the first call"
    return failure and evolve(failure, what=f"the second call: {failure.what}", guess=guess)


def _judge_shape(case: LayerCase, out: Tensor, dtype: torch.dtype) -> Failure | None:
    shape = (case.rows, sum(case.sizes))
    if tuple(out.shape) != shape:
        what = f"the result is {list(out.shape)} instead of {list(shape)}"
    elif out.dtype != dtype:
        what = f"the result is {out.dtype} instead of {dtype}"
    elif not out.is_contiguous():
        what = f"the result has strides {list(out.stride())}; models view it, so it must be dense"
    else:
        return None
    return Failure(what=what, case=case)


def judge_product(
    subject: QuantizationSubject,
    case: LayerCase,
    loaded: Loaded,
    x: Tensor,
    out: Tensor,
    exact_x: Tensor | None = None,
) -> Failure | None:
    """Judge the outputs of each projection by its own bound; `exact_x` is x before rounding."""
    if not case.rows:
        return None
    expected, first = expected_of(subject, loaded, case), 0
    seen = x if exact_x is None else exact_x
    declared = loaded.method.rounded_input(loaded.layer, x)
    if subject.rounded_input is not None:
        seen = subject.rounded_input(x, loaded.layer.spec)
    elif declared is not None:
        seen = declared
    spread, narrow = seen.double().abs().sum(1), (x if exact_x is not None else seen.to(x.dtype))
    for i, size in enumerate(case.sizes):
        part = slice(first, first + size)
        weight = expected.weight[part]
        bias = None if loaded.bias is None else loaded.bias[part]
        exact = product(seen, weight, bias)
        slack = spread[:, None] * expected.slack[part].to(out.device)
        error = ((out[:, part].double() - exact).abs() - slack).max().item()
        plain = _Plain(x=narrow, weight=expected.weight, bias=loaded.bias, part=part)
        allowed = bound(error, unit_of(x.dtype, exact), partial(plain.errors, exact))
        wrong = first_beyond(out[:, part], exact, allowed + slack, AXES)
        if wrong is not None:
            where = wrong.words if len(case.sizes) == 1 else f"projection {i}, {wrong.words}"
            guess = guess_product(subject, case, loaded, seen, out)
            return Failure(what=where, case=case, guess=guess)
        first += size
    return None


def guess_product(
    subject: QuantizationSubject, case: LayerCase, loaded: Loaded, x: Tensor, out: Tensor
) -> str | None:
    """Return the words of a known mistake that gives what came out."""
    weight, bias, sizes = expected_of(subject, loaded, case).weight, loaded.bias, case.sizes
    right = product(x, weight, bias)
    guesses = [("some outputs are left unwritten, or a weight is not loaded", right)]
    if bias is not None:
        guesses += [
            ("the bias is not added", product(x, weight, None)),
            ("the bias is added twice", right + bias.double()),
        ]
    if len(set(sizes)) == 1 and len(sizes) > 1:
        turned = torch.cat(weight.split(sizes)[::-1])
        guesses.append(("the fused projections are swapped", product(x, turned, bias)))
    if weight.shape[0] == weight.shape[1]:
        guesses.append(("the weight is not transposed", product(x, weight.T, bias)))
    if x.shape[1] % 2:
        short = torch.cat((x[:, :-1], x[:, -1:] * 0), 1)
        guesses.append(("the last input of an odd number is dropped", product(short, weight, bias)))
    if bool(out.isnan().any()):
        return guesses[0][0]
    near = 32 * unit_of(out.dtype, right) + rounding_of(subject, loaded, case)
    for words, formula in guesses[1:]:
        if bool(((out.double() - formula).abs() <= near).all()):
            return words
    if len(sizes) > 1:
        return "projections may share a scale, or their scales are mixed up"
    return None


def check_weights(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """What a layer reads back is the given weight, as near as the format rounds."""
    loaded = make_layer(subject, subject.make(), case)
    found = None if loaded is None else loaded.method.dequantize(loaded.layer)
    if loaded is None or found is None:
        return None
    if found.shape != loaded.exact.shape:
        shapes = f"{list(found.shape)} instead of {list(loaded.exact.shape)}"
        return Failure(what=f"dequantize returns {shapes}", case=case)
    rounding = rounding_of(subject, loaded, case) + torch.finfo(found.dtype).eps
    largest = [part.abs().max().item() for part in loaded.exact.split(case.sizes)]
    allowed = by_part([rounding * value for value in largest], case, subject.device)
    limits = allowed[:, None].expand_as(loaded.exact)
    wrong = first_beyond(found, loaded.exact, limits, ("output", "input"))
    if wrong is None:
        return None
    guess = "a scale is too large: projections that share one lose the small weights"
    return Failure(what=f"the weight: {wrong.words}", case=case, guess=guess)


def check_lookup(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """An embedding gives the rows of its token ids, also after a tied head was repacked."""
    method = subject.make()
    for kind in ("embedding", "tied head"):
        loaded = make_layer(subject, method, evolve(case, kind=kind))
        if loaded is None:
            continue
        layer = loaded.embedding or loaded.layer
        ids = make_input(evolve(case, kind="embedding"), subject.device)
        kept, out = ids.clone(), layer(ids)
        if tuple(out.shape) != (case.rows, case.in_features) or not same_bits(ids, kept):
            return Failure(what=f"look-ups of {case.rows} ids give {list(out.shape)}", case=case)
        rounding = rounding_of(subject, loaded, case) * loaded.exact.abs().max().item()
        wrong = first_beyond(out, loaded.exact[ids.long()], rounding, ("row", "dimension"))
        if wrong is not None:
            guess = "a tied head must leave the embedding's weight" if loaded.embedding else None
            return Failure(what=f"{kind}, look-up: {wrong.words}", case=case, guess=guess)
    return None


def check_rows_apart(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """A NaN in one row does not reach another."""
    case = evolve(case, rows=max(2, case.rows))
    loaded = make_layer(subject, subject.make(), case)
    if loaded is None:
        return None
    x = make_input(case, subject.device).clone()
    bad = case.seed % case.rows
    x[bad, case.seed % case.in_features] = float("nan")
    reached = loaded.layer(x).isnan().any(1)
    reached[bad] = False
    if not bool(reached.any()):
        return None
    row = reached.nonzero()[0].item()
    guess = "a scale or a sum is taken over all rows"
    return Failure(what=f"a NaN in row {bad} reaches row {row}", case=case, guess=guess)


def check_layers_apart(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """Two layers of one method keep their weights apart."""
    method = subject.make()
    cases = [case, evolve(case, seed=case.seed + 1)]
    layers = [make_layer(subject, method, one) for one in cases]
    for i, (one, loaded) in enumerate(zip(cases, layers, strict=True)):
        if loaded is None:
            return None
        x = make_input(one, subject.device)
        failure = judge_product(subject, one, loaded, x, loaded.layer(x))
        if failure is not None:
            guess = "something of a layer is kept where all layers share it"
            return evolve(failure, what=f"layer {i} of two: {failure.what}", guess=guess)
    return None


def check_memory(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """After loading a layer holds what is declared, or no more than its plain weight."""
    loaded = make_layer(subject, subject.make(), case)
    if loaded is None:
        return None
    held, spec = held_bytes(loaded.layer), loaded.layer.spec
    itemsize = getattr(torch, case.dtype).itemsize
    outputs = sum(case.sizes)
    plain = outputs * case.in_features * itemsize + (outputs * itemsize if case.bias else 0)
    declared = subject.weight_bytes
    if declared is not None and isinstance(spec, LinearSpec):
        if held == declared(spec):
            return None
        what = f"the layer holds {held} bytes; declared are {declared(spec)}"
    elif held <= plain:
        return None
    else:
        what = f"the layer holds {held} bytes; its plain weight has {plain}"
    guess = "the weight of the checkpoint is kept beside the repacked one"
    return Failure(what=what, case=case, guess=guess if held > loaded.held_before else None)


def check_left_alone(subject: QuantizationSubject, case: LayerCase) -> Failure | None:
    """Layers that the configuration excludes are left alone, and others are not."""
    method = subject.make()
    for name in subject.excluded:
        spec = spec_of(case, subject.device, name=name)
        if method.why_unsupported(spec) is None and method.method_for(spec) is not None:
            what = f"{name!r} is excluded by the configuration, and is quantized"
            return Failure(what=what, case=case)
    if method.method_for(spec_of(case, subject.device)) is None:
        return Failure(what="a layer that is not excluded is left alone", case=case)
    return None
