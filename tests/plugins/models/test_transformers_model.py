"""Plugin `transformers`: who is served, who is refused and why, and what it keeps of the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.errors import ConfigError
from quire.hooks.registry import load_plugins
from quire.hooks.selection import select_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.json. no such file")
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = [5, 80, 3, 3, 41, 7, 22]


def save(folder: Path, family: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.0, 0.3).add_(1.0 if "norm" in name else 0.0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def start(folder: Path, **options: Any) -> LLM:
    return LLM(
        str(folder), dtype="float32", device="cpu", num_threads=1, max_model_len=32,
        kv_cache_memory_bytes=1 << 20, **options,
    )  # fmt: skip


def complete(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def generated(oracle: Any) -> list[int]:
    given = torch.tensor([PROMPT])
    mask = torch.ones_like(given)
    found = oracle.generate(given, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return list(found[0, len(PROMPT) :].tolist())


def test_what_a_plugin_claims_is_that_plugins() -> None:
    plugin, choice = select_model(load_plugins(()), ["Qwen3ForCausalLM"])

    assert plugin.name == "qwen3"
    assert "claims" in choice.why


def test_what_nobody_claims_is_built_and_called_slower() -> None:
    plugin, choice = select_model(load_plugins(()), ["StableLmForCausalLM"])

    assert plugin.name == "transformers"
    assert choice.why == "nobody claims StableLmForCausalLM, and it can build it, only slower"


def test_unknown_architecture_is_told_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"no installed plugin builds.*Registered architectures"):
        select_model(load_plugins(()), ["StableLnForCausalLM"])


@pytest.mark.parametrize("is_tied", [False, True])
def test_it_can_be_asked_for_where_another_plugin_is_faster(tmp_path: Path, is_tied: bool) -> None:
    oracle = save(tmp_path, "Llama", tie_word_embeddings=is_tied)

    llm = start(tmp_path, model_implementation="transformers")

    assert complete(llm) == generated(oracle)


def test_its_linear_layers_are_quantized_like_any(tmp_path: Path) -> None:
    oracle = save(tmp_path, "StableLm", hidden_size=64, intermediate_size=64)

    llm = start(tmp_path, quantization="int8")

    own = llm.engine.runner.model.net.model.layers[0].self_attn.q_proj.layer
    assert type(own.method).__module__.startswith("quire_quant.int8")
    logits = oracle(torch.tensor([PROMPT])).logits[0, -1]
    assert logits[complete(llm)[0]] >= logits.max() - 0.5 * logits.std()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Olmoe": ({"num_experts": 4}, "cannot build OlmoeForCausalLM"),
    "Mamba": ({}, "has 2 layers, of which 0 call Transformers' attention interface"),
    "Falcon": ({}, "does not take an attention function: KeyError"),
    "Bloom": ({}, "has 2 layers, of which 0 call"),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, "cannot build GptOssForCausalLM"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_its_attention_cannot_do_is_refused_with_a_reason(family: str, tmp_path: Path) -> None:
    changes, says = REFUSED[family]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)

    with pytest.raises(ConfigError) as found:
        start(
            tmp_path,
            load_format="dummy",
            skip_tokenizer_init=True,
            model_implementation="transformers",
        )

    print(found.value)
    assert says in str(found.value)
    assert str(tmp_path) in str(found.value)


def test_key_that_the_class_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    save(tmp_path, "StableLm")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": "wide"'))

    with pytest.raises(ConfigError, match="hidden_size"):
        start(tmp_path)
