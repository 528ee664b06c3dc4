"""Plugin `transformers`: who is served, who is refused and why, and what it keeps of the class."""

from __future__ import annotations

import json
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
    given: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_model_len": 32,
        "kv_cache_memory_bytes": 1 << 20,
    }
    return LLM(str(folder), **{**given, **options})


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
    with pytest.raises(ConfigError, match=r"no installed plugin builds Stab.*--architectures"):
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


def test_it_gives_vectors_without_a_head(tmp_path: Path) -> None:
    oracle = save(tmp_path, "StableLm")

    [output] = start(tmp_path, task="embed").embed([{"prompt_token_ids": PROMPT}])

    last = oracle.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(last, dim=-1)
    found = torch.tensor(output.outputs.embedding)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Jamba": ({"mamba_dt_rank": 4}, "of which 0 call Transformers' attention interface"),
    "Falcon": ({}, "forms of attention of its own instead of Transformers' attention interface"),
    "Mpt": ({"max_seq_len": 64, "d_model": 32, "n_heads": 4}, "attn_config.alibi is true"),
    "Bloom": ({}, "computes with its mask by itself, as for ALiBi"),
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


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(("max_len", "kind"), [(16, "short_factor"), (32, "long_factor")])
def test_long_rope_has_the_factors_of_the_longest_sequence(
    tmp_path: Path, max_len: int, kind: str
) -> None:
    """Transformers takes them for the longest sequence of a batch, whichever that is."""
    save(tmp_path, "StableLm", rope_parameters=LONG_ROPE, partial_rotary_factor=1.0)

    llm = start(tmp_path, max_model_len=max_len)

    exponents = torch.arange(0, 8, 2) / 8
    expected = 1 / (torch.tensor(LONG_ROPE[kind]) * 100.0**exponents)
    rotary = llm.engine.runner.model.net.model.rotary_emb
    complete(llm)
    torch.testing.assert_close(rotary.inv_freq, expected)


def test_dynamic_rope_is_what_it_is_below_the_models_length(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    oracle = save(tmp_path, "StableLm", rope_parameters=dynamic, partial_rotary_factor=1.0)

    assert complete(start(tmp_path)) == generated(oracle)


CARRIED = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *given, **more):
        found = super().forward(*given, **more)
        found.logits = -found.logits
        return found
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a class that nobody knows, with its code, which turns Llama's logits round."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = tmp_path / "own"
    save(folder, "Llama")
    (folder / "own.py").write_text(CARRIED)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changed = {"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": auto_map}
    path.write_text(json.dumps({**config, **changed}))
    return folder


def test_code_of_a_checkpoint_runs_where_it_is_trusted(with_code: Path) -> None:
    llm = start(with_code, trust_remote_code=True)

    [choice] = [c for c in llm.engine.selections if c.kind == "model"]
    assert choice.used == "transformers"
    assert "runs the checkpoint's own code, slower" in choice.why
    oracle = transformers.LlamaForCausalLM.from_pretrained(with_code)
    with torch.inference_mode():
        least = int(oracle(torch.tensor([PROMPT])).logits[0, -1].argmin())
    assert complete(llm)[0] == least


def test_code_of_a_checkpoint_does_not_run_unasked(with_code: Path) -> None:
    (with_code / "own.py").write_text("raise SystemExit('it ran')")

    with pytest.raises(ConfigError, match="carries code for it, which --trust-remote-code runs"):
        start(with_code)
    with pytest.raises(ConfigError, match="does not build OwnForCausalLM"):
        start(with_code, model_implementation="transformers")


def test_code_that_cannot_be_loaded_is_told(with_code: Path) -> None:
    (with_code / "own.py").write_text("class OwnConfig: pass")

    with pytest.raises(ConfigError, match="'own.OwnForCausalLM' cannot be loaded|OwnConfig"):
        start(with_code, trust_remote_code=True)


def test_key_that_the_class_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    save(tmp_path, "StableLm")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": "wide"'))

    with pytest.raises(ConfigError, match="hidden_size"):
        start(tmp_path)
