"""A checkpoint fills the model exactly, or is refused with a list of what does not match."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors_files import save, save_sharded
from torch import Tensor
from toy_model import HIDDEN, ToyModel, build_toy, toy_tensors

from quire.errors import CheckpointError
from quire.execution import mapped_files, staged_files, weights
from quire.execution.checkpoint import PROBED_BYTES, Checkpoint
from quire.execution.mapped_files import MappedFiles
from quire.execution.staged_files import StagedFiles
from quire.execution.weights import load_weights
from quire.layers.weights import WeightStore


@pytest.fixture(autouse=True, params=[MappedFiles, StagedFiles], ids=["mapped", "staged"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load as on a CPU, and as on a GPU but to the CPU, in chunks smaller than tensors."""
    monkeypatch.setitem(weights.SOURCES, "cpu", request.param)
    monkeypatch.setattr(staged_files, "BUFFER_BYTES", 48)
    return request.param


def load(folder: Path, model: ToyModel) -> ToyModel:
    load_weights(model, Checkpoint.open(folder))
    return model


def filled(folder: Path, tensors: dict[str, Tensor], **options: Any) -> ToyModel:
    save(folder, tensors)
    return load(folder, build_toy(**options))


def problem(folder: Path, tensors: dict[str, Tensor], **options: Any) -> str:
    save(folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        load(folder, build_toy(**options))
    return str(caught.value)


def test_every_tensor_lands_in_its_place_and_fused_parts_in_order(tmp_path: Path) -> None:
    tensors = toy_tensors()

    model = filled(tmp_path, tensors)

    attention = "model.layers.0.self_attn"
    layer = model.layers[0]
    for name in ("weight", "bias"):
        parts = [tensors[f"{attention}.{part}.{name}"] for part in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(layer.qkv_proj.get_weight(name), torch.cat(parts))
    assert torch.equal(layer.o_proj.weight, tensors[f"{attention}.o_proj.weight"])
    assert torch.equal(layer.norm.weight, tensors["model.layers.0.norm.weight"])
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_sharded_checkpoint_fills_the_same_model(tmp_path: Path) -> None:
    tensors = toy_tensors()
    names = sorted(tensors)
    # Parts of one fused layer lie in different files.
    save_sharded(
        tmp_path,
        {f"m-{i}.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)},
    )

    model = load(tmp_path, build_toy())

    whole = tmp_path / "whole"
    whole.mkdir()
    for ours, theirs in zip(model.parameters(), filled(whole, tensors).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_missing_unexpected_and_wrong_shaped_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors = toy_tensors()
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    del tensors["model.layers.0.norm.weight"]
    tensors["model.layers.1.norm.weight"] = torch.ones(HIDDEN)
    tensors["lm_head.weight"] = torch.ones(3, HIDDEN)

    message = problem(tmp_path, tensors)

    assert "2 missing: model.layers.0.norm.weight, model.layers.0.self_attn.k_proj.w" in message
    assert "1 unexpected: model.layers.1.norm.weight" in message
    assert f"lm_head.weight [3, {HIDDEN}] instead of [11, {HIDDEN}]" in message
    assert str(tmp_path) in message


def test_hundreds_of_wrong_names_are_counted_and_cut(tmp_path: Path) -> None:
    tensors = toy_tensors() | {f"extra.{i:03}": torch.ones(1) for i in range(300)}

    message = problem(tmp_path, tensors)

    assert "300 unexpected: extra.000, extra.001" in message
    assert "and 292 more" in message


def test_refused_checkpoint_leaves_the_model_untouched(tmp_path: Path) -> None:
    model = build_toy()
    tensors = toy_tensors()
    del tensors["lm_head.weight"]
    save(tmp_path, tensors)

    with pytest.raises(CheckpointError):
        load(tmp_path, model)

    assert all(bool(p.isnan().all()) for p in model.parameters())


def test_fused_tensor_in_the_file_is_not_taken_for_its_parts(tmp_path: Path) -> None:
    tensors = toy_tensors()
    name = "model.layers.0.self_attn"
    parts = [tensors.pop(f"{name}.{part}.weight") for part in ("q_proj", "k_proj", "v_proj")]
    tensors[f"{name}.qkv_proj.weight"] = torch.cat(parts)

    message = problem(tmp_path, tensors)

    assert "3 missing" in message
    assert "qkv_proj.weight" in message


def test_ignored_names_are_not_unexpected(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"model.layers.0.self_attn.inv_freq": torch.ones(4)}

    assert isinstance(filled(tmp_path, tensors), ToyModel)


@pytest.mark.parametrize("has_own", [False, True])
def test_tied_head_uses_the_embedding_whether_or_not_the_file_has_a_head(
    tmp_path: Path, has_own: bool
) -> None:
    tensors = toy_tensors(tied=not has_own)

    model = filled(tmp_path, tensors, tie_word_embeddings=True)

    assert model.lm_head.get_weight("weight") is model.embed_tokens.get_weight("weight")
    hidden = torch.randn(3, HIDDEN)
    want = hidden @ tensors["model.embed_tokens.weight"].T
    torch.testing.assert_close(model.logits(hidden), want)


def test_untied_head_that_is_missing_is_an_error(tmp_path: Path) -> None:
    assert "1 missing: lm_head.weight" in problem(tmp_path, toy_tensors(tied=True))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_converted_to_the_dtype_asked_for(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = toy_tensors(dtype=stored)

    model = filled(tmp_path, tensors, dtype=wanted)

    assert model.layers[0].norm.weight.dtype is wanted
    want = tensors["model.layers.0.norm.weight"].to(wanted)
    assert torch.equal(model.layers[0].norm.weight, want)
    # Where 16-bit weights are packed the plain ones are gone: the product tells.
    product = model.layers[0].o_proj(torch.eye(HIDDEN, dtype=wanted)).T
    assert torch.equal(product, tensors["model.layers.0.self_attn.o_proj.weight"].to(wanted))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [PROBED_BYTES, -1])
def test_bad_number_deep_inside_a_tensor_is_found_while_loading(
    tmp_path: Path, value: float, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_files, "CHECKED_ELEMENTS", 16)
    tensors = toy_tensors()
    tensors["model.embed_tokens.weight"].view(-1)[at if at < 0 else at // 4] = value

    message = problem(tmp_path, tensors)

    assert "'model.embed_tokens.weight' holds NaN or infinity" in message


@pytest.mark.parametrize(
    ("stored", "name"), [(torch.int32, "I32"), (torch.bool, "BOOL"), (torch.uint8, "U8")]
)
def test_integers_where_numbers_are_expected_are_refused(
    tmp_path: Path, stored: torch.dtype, name: str
) -> None:
    tensors = toy_tensors()
    tensors["lm_head.weight"] = torch.ones(11, HIDDEN).to(stored)

    assert f"'lm_head.weight' is {name}, expected float32" in problem(tmp_path, tensors)


def test_number_that_the_dtype_cannot_hold_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["lm_head.weight"][10, 7] = 1e6

    message = problem(tmp_path, tensors, dtype=torch.float16)

    assert "'lm_head.weight'" in message
    assert "float16" in message
    assert "bfloat16" in message
    assert "damaged" not in message


def test_layers_repack_as_soon_as_they_are_full(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note_fill(_source: Any, tensor: Any, target: Tensor) -> None:
        events.append(tensor.name)

    def note_finish(layer: WeightStore) -> None:
        events.append(f"finish {layer.spec.name}")

    monkeypatch.setattr(source, "fill", note_fill)
    monkeypatch.setattr(WeightStore, "finish_loading", note_finish)
    filled(tmp_path, toy_tensors(tied=True), tie_word_embeddings=True)

    for layer, last in (
        ("model.embed_tokens", "model.embed_tokens.weight"),
        ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj.weight"),
    ):
        assert events.index(f"finish {layer}") == events.index(last) + 1
    fused = events.index("finish model.layers.0.self_attn.qkv_proj")
    assert sum("_proj" in event for event in events[:fused]) >= 6
    # A tied head waits for the embedding, so it comes last.
    assert events[-1] == "finish lm_head"
    finished = [event for event in events if event.startswith("finish")]
    assert len(finished) == len(set(finished)) == 4


class TopLevelParameter(ToyModel):
    """A model with a parameter of its own, outside any module."""

    def __init__(self, config: Any, build: Any) -> None:
        super().__init__(config, build)
        self.offset = build.parameter(HIDDEN)


def test_parameter_of_the_model_itself_has_its_plain_name(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"offset": torch.full((HIDDEN,), 3.0)}

    model = filled(tmp_path, tensors, kind=TopLevelParameter)

    assert torch.equal(model.offset, tensors["offset"])


class SinkModel(ToyModel):
    """A model whose layer has sinks and norms of q and k."""

    attention_options: ClassVar[dict[int, dict[str, Any]]] = {0: {"sinks": True, "qk_norm": 1e-6}}


def test_sinks_and_head_norms_are_loaded_into_the_attention_layer(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.sinks": torch.randn(4).bfloat16(),
        "model.layers.0.self_attn.q_norm.weight": torch.randn(2),
        "model.layers.0.self_attn.k_norm.weight": torch.randn(2),
    }

    attention = filled(tmp_path, toy_tensors() | extra, kind=SinkModel).layers[0].attn

    assert attention.sinks.dtype is torch.float32
    for ours, theirs in zip(
        (attention.sinks, attention.q_norm.weight, attention.k_norm.weight),
        extra.values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs.float())
