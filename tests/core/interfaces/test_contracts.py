"""Every field of the contracts is driven by fakes, through the real engine where it reads them.

What nobody reads yet is listed, with the issue that will; the list must be exact.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, evolve
from fake_attention import FakeAttention
from fake_model import HEAD_DIM, KV_HEADS, WINDOW, checkpoint
from fake_quantization import FakeQuantization, PackedProduct, pack, unpack
from fake_sampling import FakeSampler, HostProcessor
from recorder import Field, Recorder
from safetensors.torch import save_file

from quire.cli.main import main
from quire.config import EngineConfig
from quire.engine import Engine
from quire.errors import ConfigError, RequestError
from quire.execution.kv_cache import cache_groups
from quire.hooks import loading, validation
from quire.hooks.registry import Registry
from quire.hooks.selection import parse_attention_options, select_quantization
from quire.interfaces import attention, batch, model, plugin, quantization, sampling
from quire.layers.build import LayerBuilder
from quire.request import Request, SamplingParams
from quire.scheduling import output

RECEIVED_BY_PLUGINS = (
    attention.AttentionSpec,
    attention.LatentSpec,
    attention.BatchLimits,
    batch.Batch,
    batch.GroupBatch,
    quantization.LinearSpec,
    quantization.ExpertsSpec,
    quantization.EmbeddingSpec,
    quantization.KVCacheSpec,
    quantization.QuantizedActivation,
    sampling.SamplingBatch,
    sampling.LogitsState,
)
GIVEN_BY_PLUGINS = (
    attention.KVLayout,
    quantization.ShardRule,
    sampling.SampledTokens,
    model.WeightNames,
    model.AttentionOptions,
    plugin.Descriptor,
    plugin.PluginOption,
    plugin.AttentionPlugin,
    plugin.QuantizationPlugin,
    plugin.ModelPlugin,
    plugin.SamplerPlugin,
)
WITHIN_THE_CORE = (
    output.KVCacheGroup,
    output.AddedSequence,
    output.SchedulerOutput,
    output.StepResult,
)
# Nothing in Quire reads these in this story; the fakes above write them.
NOT_READ_YET: dict[Field, str] = {
    ("AddedSequence", "pooling"): "read where vectors are asked for, and the story asks for tokens",
    ("KVLayout", "name"): "read where two backends are asked for, of which the story has one",
    ("QuantizationPlugin", "quantizer"): "read by `quire quantize`, which is no part of the story",
    ("SampledTokens", "logprobs"): "issue 7: logprobs of what was drawn from",
    ("ShardRule", "group_size"): "issue 6: tensor parallelism cuts along groups",
    ("ShardRule", "input_dim"): "issue 6: tensor parallelism cuts inputs",
}

CONFIG = {
    "architectures": ["FakeForCausalLM"],
    "max_position_embeddings": 60,
    "quantization_config": {"quant_method": "fake-packed", "excluded": ["layers.1.attn.out"]},
}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "num_threads": 1,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    # 16 blocks: too few for all requests at once, so that some are preempted.
    "kv_cache_memory_bytes": 16 * 4 * 2 * 2 * KV_HEADS * HEAD_DIM * 4,
    "logits_processors": ("fake-history", "fake-host"),
    "attention_option": ("fake.fuse=yes",),
}


def load_plugins(disabled: Any) -> Registry:
    """Return the installed plugins and the fakes."""
    import fake_plugins

    owner = loading.Owner(plugin="fakes", distribution="fakes", version="1")
    fakes = loading.LoadedPlugin(owner=owner, module=fake_plugins, api_version=(1, 0))
    return Registry(validation.collect([*loading.import_plugins(disabled), fakes]))


def write_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint with packed linears; return it in full precision."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    full, stored = checkpoint(), {"mask.0": torch.ones(2)}
    for name, tensor in full.items():
        module, _, kind = name.rpartition(".")
        is_packed = module.rpartition(".")[2] in ("q", "k", "v", "out") and kind == "weight"
        if is_packed and module not in CONFIG["quantization_config"]["excluded"]:
            stored[f"{module}.qweight"], stored[f"{module}.scales"] = pack(tensor)
            full[name] = unpack(*pack(tensor))
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors")
    return full


@define
class Story:
    """What happened while the fakes were run."""

    engine: Engine
    full: dict[str, torch.Tensor]
    tokens: dict[tuple[str, int], list[int]]
    recorder: Recorder


def make_engine(folder: Path, **options: Any) -> Engine:
    from quire.preparation import prepare

    given = {"model": str(folder), **OPTIONS, **options}
    return Engine(prepare(EngineConfig.from_options(given)))


def make_request(number: int, length: int, **params: Any) -> Request:
    values = {"temperature": 0.0, "max_tokens": 20, **params}
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=[(7 * number + 3 * i) % 64 for i in range(length)],
        params=SamplingParams(**values),
        max_tokens=values["max_tokens"],
        seed=number,
        stop_token_ids=frozenset({number}),
    )


def run(engine: Engine) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    requests = [
        make_request(1, 9, n=2, min_tokens=4, extra_args={"fake-host": [5, 6, 7, 8, 9]}),
        make_request(2, 30, temperature=0.7, top_k=9),
        make_request(3, 5, temperature=1.0, top_p=0.9, min_p=0.1),
    ]
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        for update in engine.step():
            assert update.error is None
            tokens.setdefault((update.request_id, update.index), []).extend(update.token_ids)
    return tokens


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("fakes")
    full = write_folder(folder)
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.preparation.load_plugins", load_plugins)
        for cls in (*RECEIVED_BY_PLUGINS, *GIVEN_BY_PLUGINS, *WITHIN_THE_CORE):
            recorder.watch(cls, patch)
        engine = make_engine(folder)
        tokens = run(engine)
        _drive_what_has_no_path_yet(engine)
        _drive_what_users_see(patch)
        yield Story(engine, full, tokens, recorder)


def _drive_what_users_see(patch: pytest.MonkeyPatch) -> None:
    """List the plugins, and ask for what the fakes do not offer."""
    registry = load_plugins(())
    patch.setattr("quire.cli.plugins.load_plugins", load_plugins)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["plugins", "--json"]) == 0
    assert "the oracle in disguise" in printed.getvalue()
    with pytest.raises(ConfigError, match="fuse the write"):
        parse_attention_options(registry, [registry.attention("fake")], ["fake.fuse=maybe"])
    with pytest.raises(ConfigError, match="--quantization fake-int4 needs a checkpoint"):
        select_quantization(registry, "fake-int4", None)


def _drive_what_has_no_path_yet(engine: Engine) -> None:
    """Hand the fakes what later issues will: nothing in Quire makes these specs yet."""
    latent = attention.LatentSpec(
        kv_lora_rank=4, rope_head_dim=2, nope_head_dim=3, v_head_dim=3, plain_from=None
    )
    spec = evolve(engine.layout.groups[0].spec, latent=latent)
    assert FakeAttention.why_unsupported(spec) == "no latent attention of (4, 2) and (3, 3, None)"
    method = FakeQuantization({"excluded": []})
    experts = quantization.ExpertsSpec(
        name="e", num_experts=8, hidden_size=4, intermediate_size=6, dtype="float32", device="cpu"
    )
    assert "8 experts of 4 x 6" in str(method.why_unsupported(experts))
    cache = quantization.KVCacheSpec(name="c", num_kv_heads=2, head_dim=8, kv_dtype="fake-fp8")
    assert method.why_unsupported(cache) is None
    assert method.method_for(cache).elements == 16
    refused = quantization.KVCacheSpec(name="c", num_kv_heads=2, head_dim=8, kv_dtype="int2")
    assert "no int2" in str(method.why_unsupported(refused))


def test_plugins_of_every_kind_are_chosen_through_the_one_door(story: Story) -> None:
    assert {choice.kind: choice.used for choice in story.engine.selections} == {
        "model": "fake-model",
        "quantization": "fake-int4",
        "grammar": "llguidance",
        "attention": "fake",
        "sampler": "fake-sampler",
    }


def test_layers_with_a_window_and_layers_without_form_two_groups(story: Story) -> None:
    groups = story.engine.layout.groups

    assert [group.spec.sliding_window for group in groups] == [None, WINDOW]
    assert [group.spec.sinks for group in groups] == [True, False]
    assert [group.spec.logit_softcap for group in groups] == [20.0, None]
    assert [group.window for group in cache_groups(groups, 9)] == [None, WINDOW]
    assert [group.layout.name for group in groups] == ["fake-heads-first"] * 2


def test_workspace_and_blocks_are_in_the_memory_budget(story: Story) -> None:
    layout = story.engine.layout
    limits, groups = layout.limits, layout.groups

    rows = limits.max_num_seqs + limits.max_num_batched_tokens
    assert layout.budget.workspace == 2 * 4 * 4 * rows
    assert layout.budget.kv_blocks == OPTIONS["kv_cache_memory_bytes"]
    assert sum(group.bytes_per_block for group in groups) * 16 == layout.budget.kv_blocks


def test_packed_weights_are_loaded_part_by_part_and_excluded_layers_stay(story: Story) -> None:
    layers = story.engine.runner.model.layers
    full = story.full

    for i, layer in enumerate(layers):
        parts = [full[f"layers.{i}.attn.{part}.weight"] for part in ("q", "k", "v")]
        torch.testing.assert_close(layer.qkv.get_weight("unpacked"), torch.cat(parts))
        biases = [full[f"layers.{i}.attn.{part}.bias"] for part in ("q", "k", "v")]
        assert torch.equal(layer.qkv.bias, torch.cat(biases))
        assert torch.equal(layer.gain, full[f"layers.{i}.norm.weight"])
    assert isinstance(layers[0].out.method, PackedProduct)
    assert torch.equal(layers[1].out.get_weight("weight"), full["layers.1.attn.out.weight"])


def test_sequences_were_preempted_copied_and_chunked(story: Story) -> None:
    assert story.engine.scheduler.num_preemptions > 0
    assert set(story.tokens) == {("r1", 0), ("r1", 1), ("r2", 0), ("r3", 0)}
    assert any(seen.child_index.tolist()[:2] == [0, 1] for seen in FakeSampler.seen)


def test_fused_write_gives_the_tokens_of_the_separate_steps(story: Story, tmp_path: Path) -> None:
    write_folder(tmp_path)
    fused = [backend for backend in FakeAttention.made if backend.num_fused]
    plain = run(make_engine(tmp_path, attention_option=()))

    assert fused
    assert plain == story.tokens


def test_history_processor_saw_the_token_in_flight(story: Story) -> None:
    for tokens in story.tokens.values():
        assert all(a != b for a, b in itertools.pairwise(tokens))


def test_host_processor_took_its_arguments_from_the_request(story: Story) -> None:
    for index in range(2):
        repeated = [t for t in story.tokens["r1", index] if t in (5, 6, 7, 8, 9)]
        assert len(repeated) == len(set(repeated))
    with pytest.raises(RequestError):
        HostProcessor.check_arguments("no list", SamplingParams())


def test_min_tokens_reached_the_sampler_as_suppressed_tokens(story: Story) -> None:
    suppressed = [seen.suppressed for seen in FakeSampler.seen if seen.suppressed is not None]

    assert suppressed
    assert all(set(token_ids.tolist()) == {1} for _, token_ids in suppressed)
    assert 1 not in story.tokens["r1", 0][:3]


def test_pooling_model_without_a_score_head_says_so() -> None:
    for stage in (model.PoolingModel.scores, model.PoolingModel.logits):
        with pytest.raises(NotImplementedError, match="gives no"):
            stage(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {
            "latent": attention.LatentSpec(
                kv_lora_rank=4, rope_head_dim=2, nope_head_dim=2, v_head_dim=2
            )
        },
        {"alibi": True},
        {"causal": False},
        {"batch_invariant": True},
        {"kv_dtype": "fp8"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_backend_can_refuse_by_every_field(story: Story, change: dict[str, Any]) -> None:
    spec = story.engine.layout.groups[0].spec

    assert FakeAttention.why_unsupported(spec) is None
    assert FakeAttention.why_unsupported(evolve(spec, **change)) is not None


def test_method_that_cannot_serve_a_layer_stops_the_start_by_name() -> None:
    class Refusing(FakeQuantization):
        def why_unsupported(self, spec: Any) -> str | None:
            return "no kernel for 3 bits"

    builder = LayerBuilder(
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=8,
        quantization=Refusing({}),
        dense=FakeQuantization({}),
    )

    with pytest.raises(ConfigError, match=r"'a\.b': no kernel for 3 bits"):
        builder.linear("a.b", 16, 16)


def test_every_field_that_plugins_receive_is_read_by_a_fake(story: Story) -> None:
    names = {cls.__name__ for cls in RECEIVED_BY_PLUGINS}
    fields = {field for field in story.recorder.fields if field[0] in names}

    assert fields - story.recorder.read_by_fakes == set()


def test_every_field_that_plugins_give_is_read_by_quire(story: Story) -> None:
    names = {cls.__name__ for cls in (*GIVEN_BY_PLUGINS, *WITHIN_THE_CORE)}
    fields = {field for field in story.recorder.fields if field[0] in names}

    assert fields - story.recorder.read_by_quire == set(NOT_READ_YET)
