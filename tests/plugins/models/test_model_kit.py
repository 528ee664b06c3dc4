"""Each model plugin against the conformance kit, with the real class as its judge."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve

from quire.testing import ModelTests
from quire.testing.kit_report import PROFILES
from quire_models import (
    deepseek,
    falcon,
    gemma,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from quire_models.deepseek.model import DeepseekV2, DeepseekV3
from quire_models.falcon.model import Bloom, Falcon
from quire_models.gemma.model import Gemma2, Gemma3
from quire_models.gpt2.model import GPT2
from quire_models.gpt_oss.model import GptOss
from quire_models.llama.model import Llama, Mistral
from quire_models.mixtral.model import Mixtral
from quire_models.olmo2.model import Olmo2
from quire_models.phi3.model import Phi3
from quire_models.qwen2.model import Qwen2
from quire_models.qwen2_moe.model import Qwen2Moe
from quire_models.qwen3.model import Qwen3
from quire_models.qwen3_moe.model import Qwen3Moe

# The tests beside this one look at every variation of a config; here are some cases of each check.
FEW = evolve(PROFILES["quick"], examples=80, least=4, seconds=6)
FEWER = evolve(FEW, examples=40, seconds=3)


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


class TestPhi3(ModelTests):
    model = Phi3
    config_class = phi3.Phi3Config
    architecture = "Phi3ForCausalLM"
    profile = FEWER


class TestOlmo2(ModelTests):
    model = Olmo2
    config_class = olmo2.Olmo2Config
    architecture = "Olmo2ForCausalLM"
    profile = FEWER


class TestGemma2(ModelTests):
    model = Gemma2
    config_class = gemma.Gemma2Config
    architecture = "Gemma2ForCausalLM"
    config: ClassVar = {"sliding_window": 5}
    profile = FEWER


class TestGemma3(ModelTests):
    model = Gemma3
    config_class = gemma.Gemma3Config
    architecture = "Gemma3ForCausalLM"
    config: ClassVar = {"sliding_window": 5, "sliding_window_pattern": 2}
    profile = FEWER


class TestGPT2(ModelTests):
    model = GPT2
    config_class = gpt2.GPT2Config
    architecture = "GPT2LMHeadModel"
    profile = FEWER


class TestFalcon(ModelTests):
    model = Falcon
    config_class = falcon.FalconConfig
    architecture = "FalconForCausalLM"
    profile = FEWER


class TestBloom(ModelTests):
    model = Bloom
    config_class = falcon.BloomConfig
    architecture = "BloomForCausalLM"
    profile = FEWER


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
