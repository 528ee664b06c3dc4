"""Each model plugin against the conformance kit, with the real class as its judge."""

from __future__ import annotations

from attrs import evolve

from quire.testing import ModelTests
from quire.testing.kit_report import PROFILES
from quire_models import llama, qwen2, qwen3
from quire_models.llama.model import Llama, Mistral
from quire_models.qwen2.model import Qwen2
from quire_models.qwen3.model import Qwen3

# The tests beside this one look at every variation of a config; here are some cases of each check.
FEW = evolve(PROFILES["quick"], examples=80, least=4, seconds=6)


class TestLlama(ModelTests):
    model = Llama
    config_class = llama.LlamaConfig
    architecture = "LlamaForCausalLM"
    profile = FEW


class TestMistral(ModelTests):
    model = Mistral
    config_class = llama.MistralConfig
    architecture = "MistralForCausalLM"
    profile = FEW


class TestQwen2(ModelTests):
    model = Qwen2
    config_class = qwen2.Qwen2Config
    architecture = "Qwen2ForCausalLM"
    profile = FEW


class TestQwen3(ModelTests):
    model = Qwen3
    config_class = qwen3.Qwen3Config
    architecture = "Qwen3ForCausalLM"
    profile = FEW
