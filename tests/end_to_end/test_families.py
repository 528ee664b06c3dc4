"""Files of families as they are found: other names, other layouts, what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attrs import frozen
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import CheckpointError, ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", MORE),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", MORE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**MORE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**MORE, "head_dim": 8}),
}
PROMPT = [5, 59, 3, 3, 41, 7, 22]


@frozen
class Saved:
    """A folder as Transformers writes it, and the class in memory."""

    folder: Path
    real: Any


def save(folder: Path, family: str) -> Saved:
    torch.manual_seed(4)
    config_class, model_class, changes = FAMILIES[family]
    config = getattr(transformers, config_class)(**SIZES, **changes)
    real = getattr(transformers, model_class)(config).eval()
    for parameter in real.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
    real.save_pretrained(folder)
    return Saved(folder, real)


def change_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def change_tensors(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def start(folder: Path, **options: Any) -> LLM:
    return LLM(
        str(folder),
        device="cpu",
        skip_tokenizer_init=True,
        num_threads=1,
        kv_cache_memory_bytes=1 << 20,
        **options,
    )


def complete(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def generated(real: Any) -> list[int]:
    given = torch.tensor([PROMPT])
    real.generation_config.eos_token_id = None
    found = real.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False
    )
    return list(found[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_files_without_a_head_are_read(tmp_path: Path, family: str) -> None:
    """As the first ones on the hub are, GPT-2's with masks that nobody reads."""
    saved = save(tmp_path, family)

    def as_first(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        mask = torch.ones(1, 1, 64, 64).tril()
        return {**found, "h.0.attn.bias": mask} if family == "gpt2" else found

    change_tensors(tmp_path, as_first)

    assert complete(start(tmp_path, dtype="float32")) == generated(saved.real)


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A Gemma 3 that reads pictures; its layers are one with a window and one without."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(4)
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config={
            **SIZES,
            **MORE,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**seen, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
    )
    real = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in real.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
    real.save_pretrained(folder)
    return Saved(folder, real)


def test_text_part_of_gemma3_with_pictures(with_pictures: Saved) -> None:
    found = complete(start(with_pictures.folder, dtype="float32"))

    assert found == generated(with_pictures.real)


def test_gemma3_with_pictures_needs_a_text_config(with_pictures: Saved, tmp_path: Path) -> None:
    given = json.loads((with_pictures.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**given, "text_config": 3}))

    with pytest.raises(ConfigError, match="text_config is 3; allowed: an object"):
        start(tmp_path, load_format="dummy")


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_weights_are_quantized_as_they_are_loaded(
    tmp_path: Path, family: str, quantization: str
) -> None:
    saved = save(tmp_path, family)

    [first, *_] = complete(start(tmp_path, dtype="float32", quantization=quantization))

    logits = saved.real(torch.tensor([PROMPT])).logits[0, -1]
    assert logits[first] >= logits.max() - 0.25 * logits.std()


def test_quantize_refuses_transposed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "gpt2")

    status = main(
        ["quantize", str(tmp_path), "--method", "int8", "--output", str(tmp_path / "out")]
    )

    assert status != 0
    assert "transformer.h.0.attn.c_attn.weight is stored as [inputs, out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("gpt2", {"n_inner": 64}, "transformer.h.0.mlp.c_fc.bias [128] instead of [64]"),
        ("gpt2", {"n_positions": 32}, "transformer.wpe.weight [64, 32] instead of [32, 32]"),
        ("falcon", {"multi_query": False}, "query_key_value.weight [48, 32] instead of [96, 32]"),
        ("falcon", {"bias": True}, "missing: transformer.h.0.mlp.dense_4h_to_h.bias"),
        ("bloom", {"n_layer": 1}, "unexpected: transformer.h.1.input_layernorm.bias"),
        ("gpt2", {"n_layer": 3}, "missing: transformer.h.2.attn.c_attn.bias"),
        ("phi3", {"num_key_value_heads": 1}, "self_attn.qkv_proj.weight [64, 32] instead of [48"),
        ("phi3", {"intermediate_size": 40}, "mlp.gate_up_proj.weight [96, 32] instead of [80, 32]"),
        ("olmo2", {"num_key_value_heads": 4}, "self_attn.k_norm.weight [16] instead of [32]"),
        ("olmo2", {"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
        ("gemma2", {"head_dim": 16}, "self_attn.k_proj.weight [16, 32] instead of [32, 32]"),
        ("gemma3", {"head_dim": 16}, "self_attn.k_norm.weight [8] instead of [16]"),
    ],
)
def test_config_that_contradicts_its_weights_is_told(
    tmp_path: Path, family: str, keys: dict[str, Any], words: str
) -> None:
    save(tmp_path, family)
    change_config(tmp_path, **keys)

    with pytest.raises(CheckpointError) as found:
        start(tmp_path)

    assert words in str(found.value)


def test_an_extra_head_is_told(tmp_path: Path) -> None:
    save(tmp_path, "gemma2")
    change_tensors(tmp_path, lambda tensors: {**tensors, "score.weight": torch.ones(2, 32)})

    with pytest.raises(CheckpointError, match="1 unexpected: score.weight"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5; allowed: divisors of hidden_size"),
        ({"num_kv_heads": 3, "new_decoder_architecture": True}, "num_kv_heads is 3; allowed: div"),
        ({"parallel_attn": False, "new_decoder_architecture": True}, "parallel_attn is false"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2; allowed: 1 or null"),
        ({"activation": "silu"}, "activation is"),
    ],
)
def test_what_falcon_cannot_have_is_told(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save(tmp_path, "falcon")
    change_config(tmp_path, **keys)

    with pytest.raises(ConfigError, match=words):
        start(tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"n_head": 5}, "n_head is 5; allowed: divisors of n_embd, 32"),
        ({"activation_function": "swish"}, "activation_function is"),
        ({"add_cross_attention": True}, "add_cross_attention is true, which changes"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is"),
    ],
)
def test_what_gpt2_cannot_have_is_told(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    save(tmp_path, "gpt2")
    change_config(tmp_path, **keys)

    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        start(tmp_path)
