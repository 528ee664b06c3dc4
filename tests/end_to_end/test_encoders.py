"""Embeddings and scores are those of Transformers' classes, whatever shares a step with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import (
    FAMILIES,
    OPTIONS,
    SIZES,
    cosine,
    hidden_of,
    pooled,
    ragged,
    write_model,
    write_modules,
)
from safetensors.torch import save_file

from quire import LLM, PoolingParams
from quire.errors import ConfigError, RequestError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUIET: dict[str, Any] = {"use_tqdm": False}
KINDS = ["cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken"]
DECODERS = {"num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, write_model(folder, "BertModel")


@pytest.fixture(scope="module")
def llm(bert: tuple[Path, Any]) -> LLM:
    return LLM(str(bert[0]), **OPTIONS)


def worst_cosine(llm: LLM, model: Any, kind: str, **options: Any) -> float:
    sequences = ragged()
    outputs = llm.embed(sequences, **QUIET, **options)
    return min(
        cosine(output.outputs.embedding, pooled(kind, hidden_of(model, ids)))
        for ids, output in zip(sequences, outputs, strict=True)
    )


@pytest.mark.parametrize("end", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_every_encoder_are_those_of_the_real_class(
    family: str, end: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family + end, **FAMILIES[family])

    assert worst_cosine(LLM(str(tmp_path), **OPTIONS), model, "mean") > 0.999999


@pytest.mark.parametrize("kind", KINDS)
def test_every_pooling_is_sentence_transformers(kind: str, bert: tuple[Path, Any]) -> None:
    folder, model = bert
    llm = LLM(str(folder), **OPTIONS, pooling=kind, attention_backend="sdpa")

    assert worst_cosine(llm, model, kind) > 0.999999


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_backend_that_serves_encoders_gives_the_same(
    backend: str, bert: tuple[Path, Any]
) -> None:
    folder, model = bert
    llm = LLM(str(folder), **OPTIONS, attention_backend=backend)

    assert worst_cosine(llm, model, "mean") > 0.999999


def test_modules_after_pooling_are_applied_in_order(tmp_path: Path) -> None:
    model = write_model(tmp_path, "BertModel")
    write_modules(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True})
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules[:2], dense, modules[2]]))
    (tmp_path / "2_Dense").mkdir()
    sizes = {"in_features": 64, "out_features": 8}
    given = {**sizes, "activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense/config.json").write_text(json.dumps(given))
    layer = torch.nn.Linear(64, 8)
    tensors = {f"linear.{name}": p.data for name, p in layer.named_parameters()}
    save_file(tensors, tmp_path / "2_Dense/model.safetensors")
    llm = LLM(str(tmp_path), **OPTIONS)

    for ids, output in zip(ragged(), llm.embed(ragged(), **QUIET), strict=True):
        hidden = hidden_of(model, ids)
        wanted = layer(torch.cat((pooled("cls", hidden), pooled("mean", hidden)))).tanh()
        assert cosine(output.outputs.embedding, wanted.detach()) > 0.999999
        assert math.isclose(math.hypot(*output.outputs.embedding), 1, rel_tol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_encoder_are_those_of_the_real_class(family: str, tmp_path: Path) -> None:
    name = f"{family}ForSequenceClassification"
    model = write_model(tmp_path, name, **FAMILIES[family], num_labels=3)
    llm = LLM(str(tmp_path), **OPTIONS)

    for ids, output in zip(ragged(), llm.classify(ragged(), **QUIET), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted, atol=1e-5, rtol=0)


def test_pairs_are_read_together_and_told_apart_by_their_types(tmp_path: Path) -> None:
    model = write_model(tmp_path, "BertForSequenceClassification", num_labels=1)
    llm = LLM(str(tmp_path), **OPTIONS)
    query, documents = "w1 w2", ["w3 w4 w5", "w1", "w9 " * 20, ""]

    outputs = llm.score(query, documents, **QUIET)

    for document, output in zip(documents, outputs, strict=True):
        words = [4 + int(word[1:]) for word in document.split()]
        ids, types = [2, 5, 6, 3, *words, 3], [0] * 4 + [1] * (len(words) + 1)
        with torch.no_grad():
            logit = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        assert output.prompt_token_ids == ids
        assert math.isclose(output.outputs.score, logit.sigmoid().item(), abs_tol=1e-5)
    raw = llm.score(query, "w1", pooling_params=PoolingParams(use_activation=False), **QUIET)
    assert math.isclose(
        1 / (1 + math.exp(-raw[0].outputs.score)), outputs[1].outputs.score, abs_tol=1e-5
    )
    # The longer text is cut, as tokenizers do.
    (cut,) = llm.score(query, "w9 " * 20, truncate_prompt_tokens=9, **QUIET)
    assert cut.prompt_token_ids == [2, 5, 6, 3, 13, 13, 13, 13, 3]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_decoders_embed_and_score_by_their_last_token(family: str, tmp_path: Path) -> None:
    # Steps of 16 tokens cut the longest input into chunks; three sequences share 11 blocks.
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "block_size": 8}
    options = {**OPTIONS, **small, "kv_cache_memory_bytes": 11 * 2 * 2 * 2 * 8 * 8 * 4}
    for end in ("Model", "ForCausalLM"):
        model = write_model(tmp_path, family + end, **DECODERS, tie_word_embeddings=False)
        llm = LLM(str(tmp_path), **options, task="embed")
        assert worst_cosine(llm, model, "lasttoken") > 0.999999
        again = llm.embed(ragged(), **QUIET)
        assert again[2].outputs.embedding == llm.embed(ragged()[2], **QUIET)[0].outputs.embedding
        assert llm.engine.block_manager.num_hit_tokens > 0
        assert llm.engine.block_manager.num_used_blocks == 0
    name = f"{family}ForSequenceClassification"
    model = write_model(tmp_path, name, **DECODERS, num_labels=3, pad_token_id=0)
    llm = LLM(str(tmp_path), **options)
    for ids, output in zip(ragged(), llm.classify(ragged(), **QUIET), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted, atol=1e-5, rtol=0)


def test_decoder_pools_all_tokens_where_it_is_asked_to(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen3ForCausalLM", **DECODERS)
    llm = LLM(str(tmp_path), **OPTIONS, task="embed", pooling="mean", max_num_seqs=2)

    assert worst_cosine(llm, model, "mean") > 0.999999
    assert not llm.engine.config.cache.enable_prefix_caching


def test_folder_of_sentence_transformers_makes_a_decoder_embed(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen3ForCausalLM", **DECODERS)
    write_modules(tmp_path, {"pooling_mode_lasttoken": True})
    prompts = {"prompts": {"query": "w7 w8 ", "document": ""}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    llm = LLM(str(tmp_path), **OPTIONS)

    (plain,) = llm.embed("w7 w8 w1", **QUIET)
    (named,) = llm.embed("w1", prompt_name="query", **QUIET)

    assert named == type(plain)(
        request_id=named.request_id, outputs=plain.outputs, prompt_token_ids=[2, 11, 12, 5, 3]
    )
    assert cosine(plain.outputs.embedding, hidden_of(model, plain.prompt_token_ids)[-1]) > 0.999999
    with pytest.raises(RequestError, match="prompt_name is 'title'; the checkpoint has: 'query'"):
        llm.embed("w1", prompt_name="title", **QUIET)
    with pytest.raises(RequestError, match="prompt goes before a text"):
        llm.embed([1, 2], prompt_name="query", **QUIET)


def test_prompt_may_be_left_out_of_the_vector(tmp_path: Path) -> None:
    model = write_model(tmp_path, "BertModel")
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    prompts = {"prompts": {"query": "w7 w8 "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    llm = LLM(str(tmp_path), **OPTIONS)

    outputs = llm.embed(["w1 w2", "w3", [2, 5, 3]], **QUIET)

    assert outputs[0].prompt_token_ids == [2, 11, 12, 5, 6, 3]
    for output, skipped in zip(outputs, (3, 3, 0), strict=True):
        hidden = hidden_of(model, output.prompt_token_ids)[skipped:]
        assert cosine(output.outputs.embedding, hidden.mean(0)) > 0.999999


def test_lengths_come_from_the_folder_and_longer_inputs_are_refused_or_cut(
    tmp_path: Path, llm: LLM
) -> None:
    write_model(tmp_path, "BertModel")
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True})
    lengths = {"max_seq_length": 10, "do_lower_case": True}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(lengths))
    short = LLM(str(tmp_path), **OPTIONS)

    assert (short.engine.max_model_len, llm.engine.max_model_len) == (10, 64)
    with pytest.raises(RequestError, match="input has 12 tokens, but the model takes 10"):
        short.embed("W1 " * 10, **QUIET)
    (cut,) = short.embed("W1 " * 10, truncate_prompt_tokens=-1, **QUIET)
    assert cut.prompt_token_ids == [2, *[5] * 8, 3]
    (shorter,) = short.embed("W1 " * 10, truncate_prompt_tokens=4, **QUIET)
    assert shorter.prompt_token_ids == [2, 5, 5, 3]
    for wanted, allowed in ((2, "allowed: from 3"), (11, "up to the model's 10")):
        with pytest.raises(RequestError, match=allowed):
            short.embed("w1", truncate_prompt_tokens=wanted, **QUIET)


def test_dimensions_are_cut_and_normalised_again(llm: LLM) -> None:
    (whole,) = llm.embed("w1 w2", **QUIET)
    (cut,) = llm.embed("w1 w2", PoolingParams(dimensions=8), **QUIET)
    (raw,) = llm.embed("w1 w2", PoolingParams(normalize=False), **QUIET)

    assert len(cut.outputs.embedding) == 8
    assert math.isclose(math.hypot(*cut.outputs.embedding), 1, rel_tol=1e-6)
    assert cosine(cut.outputs.embedding, whole.outputs.embedding[:8]) > 0.9999999
    assert math.hypot(*raw.outputs.embedding) > 1.5
    with pytest.raises(RequestError, match="dimensions is 33; allowed: 1 to 32"):
        llm.embed("w1", PoolingParams(dimensions=33), **QUIET)


def test_thousands_of_inputs_keep_their_order(llm: LLM) -> None:
    texts = [f"w{i % 60} w{i % 7}" for i in range(3000)]

    outputs = llm.embed(texts, **QUIET)

    alone = {text: llm.embed(text, **QUIET)[0].outputs.embedding for text in set(texts[:20])}
    for text, output in zip(texts[:20], outputs, strict=False):
        assert cosine(output.outputs.embedding, alone[text]) > 0.999999
    assert len(outputs) == 3000
    assert not llm.engine.has_unfinished()


def test_embeddings_of_pairs_are_compared_by_their_angle(llm: LLM) -> None:
    one, other = (o.outputs.embedding for o in llm.embed(["w1 w2", "w3"], **QUIET))

    (output,) = llm.score("w1 w2", "w3", **QUIET)

    assert math.isclose(output.outputs.score, cosine(one, other), abs_tol=1e-6)
    with pytest.raises(RequestError, match="text_1 has 2 texts and text_2 3"):
        llm.score(["w1", "w2"], ["w1", "w2", "w3"], **QUIET)


@pytest.mark.parametrize("bad", ["", [], [[]], [[1, 999]], [[1, -1]], [{"prompt": ""}], 7])
def test_bad_input_is_refused_before_anything_runs(llm: LLM, bad: Any) -> None:
    if bad == []:
        assert llm.embed(bad, **QUIET) == []
        return
    with pytest.raises(RequestError):
        llm.embed(["w1", *bad] if isinstance(bad, list) else bad, **QUIET)
    assert not llm.engine.has_unfinished()


def test_doors_refuse_what_the_model_is_not_for(llm: LLM, tmp_path: Path) -> None:
    for ask in (llm.generate, lambda text, **_: llm.chat([{"role": "user", "content": text}])):
        with pytest.raises(RequestError, match="served for embeddings .* use LLM.embed"):
            ask("w1", use_tqdm=False)
    with pytest.raises(RequestError, match="served for embeddings"):
        llm.classify("w1", **QUIET)
    write_model(tmp_path, "Qwen3ForCausalLM", **DECODERS)
    generator = LLM(str(tmp_path), **OPTIONS)
    for ask in (generator.embed, generator.classify, lambda text, **_: generator.score(text, text)):
        with pytest.raises(RequestError, match="start it with --task embed"):
            ask("w1", **QUIET)


def test_row_that_is_not_finite_fails_alone(bert: tuple[Path, Any]) -> None:
    llm = LLM(str(bert[0]), **OPTIONS)
    llm.engine.runner.model.embeddings.words.weight[4 + 9] = math.nan

    with pytest.warns(UserWarning, match="not finite"):
        outputs = llm.embed(["w1", "w9 w1", "w2"], **QUIET)

    assert [len(output.outputs.embedding) for output in outputs] == [32, 0, 32]


def test_wrong_combinations_stop_the_start(bert: tuple[Path, Any], tmp_path: Path) -> None:
    folder = str(bert[0])
    for options, words in (
        ({"task": "generate"}, "this architecture allows embed"),
        ({"task": "classify"}, "this architecture allows embed"),
        ({"pooling": "median"}, "--pooling is .*allowed: auto, or some of cls"),
        ({"max_num_batched_tokens": 32}, "in one step: raise it to 64"),
        ({"max_model_len": 65}, "this model reaches 64"),
        ({"logits_processors": ("dry",)}, "this model gives no tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            LLM(folder, **OPTIONS, **options)


def test_config_that_contradicts_the_weights_names_the_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, "missing: encoder.layer.2.attention"),
        ({"hidden_size": SIZES["hidden_size"] * 2}, "of another shape than config.json says"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=words):
            LLM(str(tmp_path), **OPTIONS)
