"""Encoders against the conformance kit: they pass, and one with a mistake is caught."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.testing import ModelTests, check_model
from quire.testing.kit_model import ModelSubject
from quire.testing.kit_report import PROFILES
from quire_models.bert.model import Bert
from quire_models.encoder import Encoder, EncoderLayer
from quire_models.encoder_config import EncoderConfig
from quire_models.mpnet import MPNetConfig
from quire_models.mpnet.model import MPNet, MPNetClassifier
from quire_models.qwen3 import Qwen3Config
from quire_models.qwen3.model import Qwen3Classifier
from quire_models.roberta import RobertaConfig
from quire_models.roberta.model import Roberta

FEW = evolve(PROFILES["quick"], examples=30, least=3, seconds=5, longest=20)


class TestBert(ModelTests):
    model = Bert
    config_class = EncoderConfig
    architecture = "BertModel"
    profile = FEW


class TestMPNetClassifier(ModelTests):
    model = MPNetClassifier
    config_class = MPNetConfig
    architecture = "MPNetForSequenceClassification"
    profile = FEW


class TestQwen3Classifier(ModelTests):
    model = Qwen3Classifier
    config_class = Qwen3Config
    architecture = "Qwen3ForSequenceClassification"
    config: ClassVar = {"pad_token_id": 0}
    profile = FEW


class Causal(Bert):
    def attention(self, *given: Any) -> nn.Module:
        layer: Any = super().attention(*given)
        layer.options = evolve(layer.options, causal=True)
        return layer


class Unscaled(Bert):
    def attention(self, *given: Any) -> nn.Module:
        layer: Any = super().attention(*given)
        layer.options = evolve(layer.options, scale=1.0)
        return layer


class NoNormAfterAttention(Bert):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.encoder:
            layer.attention_norm.forward = lambda x: x


class NoTypes(Bert):
    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        kept, self.embeddings.types = self.embeddings.types, None
        found = super().forward(hidden, batch)
        self.embeddings.types = kept
        return found


class SkippedLayer(Bert):
    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        x = self.embeddings(hidden, self.position_rows(batch), batch.segments)
        found: Tensor = self.encoder[0](x, batch, None)
        return found


class PositionsOfBert(Roberta):
    position_rows = Encoder.position_rows


class PaddingCounted(Roberta):
    def position_rows(self, batch: Batch) -> Tensor:
        return batch.positions + 2


class NoBias(MPNet):
    def bias(self, batch: Batch) -> Tensor:
        return torch.zeros_like(super().bias(batch))


class ReluForGelu(Bert):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        for layer in self.encoder:
            assert isinstance(layer, EncoderLayer)
            layer.hidden_act = "relu"


BROKEN = {
    Causal: ("BertModel", EncoderConfig),
    Unscaled: ("BertModel", EncoderConfig),
    NoNormAfterAttention: ("BertModel", EncoderConfig),
    NoTypes: ("BertModel", EncoderConfig),
    SkippedLayer: ("BertModel", EncoderConfig),
    ReluForGelu: ("BertModel", EncoderConfig),
    PositionsOfBert: ("RobertaModel", RobertaConfig),
    PaddingCounted: ("RobertaModel", RobertaConfig),
    NoBias: ("MPNetModel", MPNetConfig),
}


@pytest.mark.parametrize("model", BROKEN, ids=lambda model: model.__name__)
def test_encoder_with_a_mistake_is_caught(model: type[Encoder]) -> None:
    architecture, config_class = BROKEN[model]
    subject = ModelSubject(model=model, config_class=config_class, architecture=architecture)

    report = check_model(subject, profile=evolve(FEW, seconds=30, examples=60))

    (failed,) = [check for check in report.checks if check.outcome == "failed"]
    assert failed.name == "logits", failed
    assert "raises" not in failed.detail, failed
