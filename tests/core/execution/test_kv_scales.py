"""Scales of a quantized KV cache: read, calibrated, and refused; and engines that use them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire import LLM, SamplingParams
from quire.errors import CheckpointError, ConfigError
from quire.execution.kv_scales import CALIBRATION_TOKENS, MARGIN
from quire.layers.attention import Attention

LARGEST = {"fp8": 448.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
SMALL = {
    **{"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 4, "block_size": 4, "num_threads": 1},
    **{"skip_tokenizer_init": True, "max_model_len": 96, "attention_backend": "sdpa"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with two KV heads."""
    return tiny_llama.write_folder(tmp_path, max_position_embeddings=512)


def add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def scales_in(names: tuple[str, str], *shape: int) -> dict[str, Tensor]:
    """Return scales of both layers, another one each, under the given names."""
    found = {}
    for layer in range(tiny_llama.CONFIG["num_hidden_layers"]):
        for number, name in enumerate(names):
            values = torch.arange(1.0, 1.0 + max(1, torch.Size(shape).numel())) / 64
            place = f"model.layers.{layer}.self_attn.{name}"
            found[place] = (values * (1 + layer + 2 * number)).reshape(shape)
    return found


def open_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"kv_cache_dtype": "fp8", **SMALL, **options})


def layers_of(llm: LLM) -> list[Attention]:
    return [m for m in llm.engine.runner.model.modules() if isinstance(m, Attention)]


NAMES = {
    "vLLM and compressed-tensors": ("k_scale", "v_scale"),
    "vLLM's modules": ("attn.k_scale", "attn.v_scale"),
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "compressed-tensors of old": ("k_proj.output_scale", "v_proj.output_scale"),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "a number": (),
    "of one": (1,),
    "of heads": (2,),
    "attn_head": (2, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_scales_of_the_checkpoint_are_used(
    folder: Path, names: tuple[str, str], shape: tuple[int, ...]
) -> None:
    tensors = scales_in(names, *shape)
    add_tensors(folder, tensors)

    layers = layers_of(open_llm(folder))

    for layer in layers:
        for name, found in zip(names, (layer.k_scale, layer.v_scale), strict=True):
            wanted = tensors[f"model.layers.{layer.index}.self_attn.{name}"].flatten().expand(2)
            assert found is not None
            assert torch.equal(found, wanted)
            assert found.is_contiguous()


def test_one_scale_of_keys_and_values_serves_both(folder: Path) -> None:
    add_tensors(folder, scales_in(("kv_scale", "kv_scale")))

    layer = layers_of(open_llm(folder))[0]

    assert layer.k_scale.tolist() == layer.v_scale.tolist() != [1.0, 1.0]


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_scales_that_nobody_asks_for_are_warned_of(folder: Path, names: tuple[str, str]) -> None:
    add_tensors(folder, {**scales_in(names), **scales_in(("q_scale", "attn.q_scale"))})

    with pytest.warns(UserWarning, match="has scales of an fp8 KV cache, which nobody reads"):
        llm = open_llm(folder, kv_cache_dtype="auto")

    assert {layer.k_scale for layer in layers_of(llm)} == {None}


def test_scales_of_a_cache_that_is_wide_by_choice_are_passed_over(folder: Path) -> None:
    add_tensors(folder, scales_in(NAMES["ModelOpt"]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = open_llm(folder, kv_cache_dtype="float32")

    assert {layer.k_scale for layer in layers_of(llm)} == {None}


def test_checkpoint_that_asks_for_fp8_gets_it_by_itself(folder: Path) -> None:
    add_tensors(folder, scales_in(("k_scale", "v_scale")))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    change_config(folder, quantization_config={**config, "ignore": ["*"]})

    llm = open_llm(folder, kv_cache_dtype="auto")

    assert llm.engine.config.value("kv_cache_dtype") == "fp8"
    assert llm.engine.config.source("kv_cache_dtype") == "model"
    assert layers_of(llm)[0].kv_cache.dtype == torch.float8_e4m3fn
    wide = open_llm(folder, kv_cache_dtype="float32")
    assert layers_of(wide)[0].kv_cache.dtype == torch.float32


def test_scheme_that_is_not_served_is_refused_with_the_file(folder: Path) -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    change_config(folder, quantization_config={"quant_method": "fp8", "kv_cache_scheme": scheme})

    with pytest.raises(ConfigError, match=r"config\.json.*kv_cache_scheme: type is 'int'"):
        open_llm(folder, kv_cache_dtype="auto")


PLACE = "model.layers.1.self_attn.v_scale"
WRONG = {
    "has 3 numbers; a scale of the KV cache has 1, or one for each of 2": torch.ones(3),
    "holds 0; a scale": torch.zeros(1),
    "holds -1; a scale": -torch.ones(2),
    "is I32; a scale is a float": torch.ones(1, dtype=torch.int32),
    "is missing, while other layers have scales": None,
}


@pytest.mark.parametrize(("words", "tensor"), WRONG.items(), ids=WRONG)
def test_wrong_scale_is_refused_by_the_name_of_its_tensor(
    folder: Path, words: str, tensor: Tensor | None
) -> None:
    tensors = scales_in(("k_scale", "v_scale"))
    del tensors[PLACE]
    add_tensors(folder, tensors if tensor is None else {**tensors, PLACE: tensor})

    with pytest.raises(CheckpointError) as caught:
        open_llm(folder)

    assert f"tensor '{PLACE}' {words}" in str(caught.value)


def test_nan_among_scales_is_refused(folder: Path) -> None:
    tensors = scales_in(("k_scale", "v_scale"))
    add_tensors(folder, {**tensors, PLACE: torch.tensor([1.0, float("nan")])})

    with pytest.raises(CheckpointError, match=f"{PLACE}.* NaN|{PLACE}.* nan"):
        open_llm(folder)


def test_wrong_scales_do_not_matter_where_others_are_asked_for(folder: Path) -> None:
    add_tensors(folder, {**scales_in(("k_scale", "v_scale")), PLACE: torch.zeros(1)})

    layers = layers_of(open_llm(folder, kv_cache_scales="calibrated"))

    assert all(bool((layer.v_scale > 0).all()) for layer in layers)


@pytest.mark.parametrize("name", LARGEST)
def test_calibrated_scales_leave_room_above_what_the_run_wrote(folder: Path, name: str) -> None:
    """The run is repeated in a cache that is not quantized, which is then looked at."""
    wide = open_llm(folder, kv_cache_dtype="float32", max_model_len=CALIBRATION_TOKENS + 4,
                    max_num_batched_tokens=512)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vocab = tiny_llama.CONFIG["vocab_size"]
    ids = torch.randint(vocab, (CALIBRATION_TOKENS,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    wide.generate({"prompt_token_ids": ids}, params, use_tqdm=False)

    found = layers_of(open_llm(folder, kv_cache_dtype=name, max_model_len=CALIBRATION_TOKENS + 4))

    for layer, seen in zip(found, layers_of(wide), strict=True):
        # [num_blocks, block_size, num_kv_heads, 2, head_dim], as sdpa keeps it.
        most = seen.kv_cache.unflatten(-1, (2, seen.head_dim)).abs().amax(dim=(0, 1, 4))
        torch.testing.assert_close(layer.k_scale, most[:, 0] * MARGIN / LARGEST[name])
        torch.testing.assert_close(layer.v_scale, most[:, 1] * MARGIN / LARGEST[name])


def test_unit_scales_are_one_and_warned_of(folder: Path) -> None:
    with pytest.warns(UserWarning, match="--kv-cache-scales unit: .* are clipped"):
        llm = open_llm(folder, kv_cache_scales="unit")

    assert all(layer.k_scale.tolist() == [1.0, 1.0] for layer in layers_of(llm))


def test_random_weights_are_calibrated_too(folder: Path) -> None:
    llm = open_llm(folder, load_format="dummy")

    assert all(bool((layer.k_scale > 0).all()) for layer in layers_of(llm))
    assert layers_of(llm)[0].k_scale.tolist() != [1.0, 1.0]
