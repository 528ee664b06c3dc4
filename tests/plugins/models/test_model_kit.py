"""Each model plugin against the conformance kit, with the real class as its judge."""

from __future__ import annotations

from attrs import evolve

from quire.testing import ModelTests
from quire.testing.kit_report import PROFILES
from quire_models import deepseek, gpt_oss, llama, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from quire_models.deepseek.model import DeepseekV2, DeepseekV3
from quire_models.gpt_oss.model import GptOss
from quire_models.llama.model import Llama, Mistral
from quire_models.mixtral.model import Mixtral
from quire_models.qwen2.model import Qwen2
from quire_models.qwen2_moe.model import Qwen2Moe
from quire_models.qwen3.model import Qwen3
from quire_models.qwen3_moe.model import Qwen3Moe

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


class TestMixtral(ModelTests):
    model = Mixtral
    config_class = mixtral.MixtralConfig
    architecture = "MixtralForCausalLM"
    profile = FEW


class TestQwen2Moe(ModelTests):
    model = Qwen2Moe
    config_class = qwen2_moe.Qwen2MoeConfig
    architecture = "Qwen2MoeForCausalLM"
    profile = FEW


class TestQwen3Moe(ModelTests):
    model = Qwen3Moe
    config_class = qwen3_moe.Qwen3MoeConfig
    architecture = "Qwen3MoeForCausalLM"
    profile = FEW


class TestDeepseekV2(ModelTests):
    model = DeepseekV2
    config_class = deepseek.DeepseekV2Config
    architecture = "DeepseekV2ForCausalLM"
    profile = FEW


class TestDeepseekV3(ModelTests):
    model = DeepseekV3
    config_class = deepseek.DeepseekV3Config
    architecture = "DeepseekV3ForCausalLM"
    profile = FEW


class TestGptOss(ModelTests):
    model = GptOss
    config_class = gpt_oss.GptOssConfig
    architecture = "GptOssForCausalLM"
    profile = FEW
