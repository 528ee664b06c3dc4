"""What the kit says of a declaration of batch invariance that is not true."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.interfaces.attention import AttentionSpec
from quire.interfaces.quantization import LayerMethod, LayerSpec
from quire.testing.attention_cases import Case
from quire.testing.attention_checks import check_batch_invariance
from quire.testing.attention_run import Subject
from quire.testing.dense_attention import DenseAttention
from quire.testing.dense_layers import PlainWeight, PlainWeights
from quire.testing.kit_model import ModelSubject
from quire.testing.kit_quantization import QuantizationSubject
from quire.testing.model_cases import ModelCase
from quire.testing.model_checks import check_batch_invariance as check_model_bits
from quire.testing.quantization_bits import check_batch_invariance as check_rows
from quire.testing.quantization_cases import LayerCase
from quire_models.llama import LlamaConfig
from quire_models.llama.model import Llama

SPEC = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    value_head_dim=16,
    scale=0.25,
    dtype="float32",
    kv_dtype="float32",
    block_size=4,
    device="cpu",
)


class CutDecides(DenseAttention):
    """Right to the last bit, which tells whether a token's sequence has others in the step."""

    def attend(self, layer: Any, q: Tensor, *others: Any) -> None:
        super().attend(layer, q, *others)
        plan, out = others[3], others[4]
        singles = plan.query_lens.count(1)
        out[singles:] = torch.nextafter(out[singles:], out[singles:] + 1)


def test_attention_that_depends_on_how_a_sequence_is_cut_is_caught() -> None:
    cases = [Case(spec=SPEC, lengths=((1, 9), (7, 40)), seed=seed) for seed in range(6)]

    found = [check_batch_invariance(Subject(backend=CutDecides), case) for case in cases]
    right = [check_batch_invariance(Subject(backend=DenseAttention), case) for case in cases]

    assert right == [None] * len(cases)
    caught = [failure for failure in found if failure is not None]
    assert len(caught) == len(cases)
    assert all("the last 1 of 7 tokens of sequence 1" in one.what for one in caught)
    assert all("how a sequence is cut" in (one.guess or "") for one in caught)


class RowsDecide(PlainWeight):
    """Fixed for a few rows, and another product for many."""

    def apply(self, layer: Any, x: Any, bias: Tensor | None) -> Tensor:
        out = super().apply(layer, x, bias)
        return out if len(x) < 64 or self.looks_up else torch.nextafter(out, out + 1)


class Few(PlainWeights):
    """Lets the number of rows decide beyond those that a batch has mostly."""

    def method_for(self, spec: LayerSpec) -> LayerMethod | None:
        method = super().method_for(spec)
        return RowsDecide(method.shape, method.spec) if isinstance(method, PlainWeight) else None


def test_product_that_changes_with_many_rows_is_caught() -> None:
    case = LayerCase(in_features=48, sizes=(24,), rows=9)

    failed = check_rows(QuantizationSubject(method=Few, config={}), case)

    assert failed is not None
    assert "12 times as many" in failed.what
    assert check_rows(QuantizationSubject(method=PlainWeights, config={}), case) is None


class Turns(Llama):
    """Computes hidden states otherwise where there are several tokens."""

    def forward(self, hidden: Tensor, batch: Any) -> Tensor:
        return super().forward(hidden * 3 / 3 if len(hidden) > 1 else hidden, batch)


def subject_of(model: type[Llama]) -> ModelSubject:
    return ModelSubject(model=model, config_class=LlamaConfig, architecture="LlamaForCausalLM")


def test_model_whose_bits_depend_on_the_step_is_caught() -> None:
    case = ModelCase(lengths=(9, 4), chunk=3)

    failed = check_model_bits(subject_of(Turns), case)

    assert failed is not None
    assert "otherwise for another number of tokens" in (failed.guess or "")
    assert check_model_bits(subject_of(Llama), case) is None
