"""The routes that give vectors and scores: embeddings, rerank, score, classify."""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.pooled_outputs import embedding_of, probabilities_of, similarity_of
from quire.pooling_params import PoolingParams
from quire.pooling_setup import CLASSIFY, EMBED, PoolingSetup
from quire.server.access import combined_salt
from quire.server.answers import to_json
from quire.server.pooling_job import PoolingAsked, PoolingJob
from quire.server.protocol.parsing import parse
from quire.server.protocol.pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingBody,
    RerankRequest,
    ScoreRequest,
)
from quire.server.records import record_of
from quire.server.replies import WholeReply
from quire.server.requests import body_of
from quire.server.service import Service
from quire.text.pooling_input import TextPair, check_scores, pair_up

log = logging.getLogger("quire.server.prompts")

Write = Callable[[list[bytes]], dict[str, Any]]


class PoolingRoutes:
    """Handlers of the routes that give vectors and scores."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embeddings(self, request: Request) -> Response:
        """Return an embedding for each input."""
        asked = parse(await body_of(request, self._service.options), EmbeddingRequest)
        setup, params = self._begin(asked, EMBED)
        shown = _base64 if asked.encoding_format == "base64" else _floats

        def write(vectors: list[bytes]) -> dict[str, Any]:
            data = [
                {"object": "embedding", "index": i, "embedding": shown(v, setup, params)}
                for i, v in enumerate(vectors)
            ]
            return {"object": "list", "data": data, "model": asked.model}

        return await self._reply(request, asked, asked.inputs(), params, write)

    async def classify(self, request: Request) -> Response:
        """Return a number for each class of each input."""
        asked = parse(await body_of(request, self._service.options), ClassifyRequest)
        setup, params = self._begin(asked, CLASSIFY)

        def write(vectors: list[bytes]) -> dict[str, Any]:
            data = []
            for index, vector in enumerate(vectors):
                probs = probabilities_of(vector, setup, params)
                label = setup.labels[int(probs.argmax())]
                entry = {"index": index, "label": label, "probs": probs.tolist()}
                data.append({**entry, "num_classes": len(probs)})
            return {**_head("classify", asked), "object": "list", "data": data}

        return await self._reply(request, asked, asked.inputs(), params, write)

    async def score(self, request: Request) -> Response:
        """Return how well the texts of each pair fit."""
        asked = parse(await body_of(request, self._service.options), ScoreRequest)
        pairs = pair_up(asked.text_1, asked.text_2)
        setup, params = self._begin(asked, CLASSIFY, EMBED)
        inputs, scores_of = _plan(pairs, setup, params)

        def write(vectors: list[bytes]) -> dict[str, Any]:
            data = [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores_of(vectors))
            ]
            return {**_head("score", asked), "object": "list", "data": data}

        return await self._reply(request, asked, inputs, params, write)

    async def rerank(self, request: Request) -> Response:
        """Return documents in order, the one that fits the query best first."""
        asked = parse(await body_of(request, self._service.options), RerankRequest)
        setup, params = self._begin(asked, CLASSIFY, EMBED)
        texts = asked.texts()
        inputs, scores_of = _plan([(asked.query, text) for text in texts], setup, params)

        def write(vectors: list[bytes]) -> dict[str, Any]:
            scores = scores_of(vectors)
            order = sorted(range(len(texts)), key=lambda i: -scores[i])[: asked.top_n]
            results: list[dict[str, Any]] = []
            for index in order:
                results.append({"index": index, "relevance_score": scores[index]})
                if asked.return_documents is not False:
                    results[-1]["document"] = {"text": texts[index]}
            return {**_head("rerank", asked), "results": results}

        return await self._reply(request, asked, inputs, params, write)

    def _begin(self, asked: PoolingBody, *tasks: str) -> tuple[PoolingSetup, PoolingParams]:
        """Refuse what this model does not do. Raises: RequestError, OverloadedError, ApiError."""
        self._service.check_open()
        self._service.check_model(asked.model)
        setup = self._service.frontend.pooling_setup(*tasks)
        if EMBED in tasks and CLASSIFY in tasks:
            check_scores(setup)
        return setup, asked.pooling_params()

    async def _reply(
        self,
        request: Request,
        body: PoolingBody,
        inputs: Sequence[Any],
        params: PoolingParams,
        write: Write,
    ) -> Response:
        """Queue the inputs and return what answers when all are done."""
        scope = request.scope
        asked = PoolingAsked(
            inputs=inputs,
            params=params,
            priority=body.priority or 0,
            cache_salt=combined_salt(scope["state"].get("quire_key"), body.cache_salt) or None,
        )
        most = self._service.max_step_tokens
        job = await PoolingJob.begin(self._service.engine, asked, max_step_tokens=most)
        record_of(scope).generation = job
        if self._service.options.log_prompts:
            for one in inputs:
                fields = {"request_id": scope["state"]["request_id"], "prompt": _shown(one)}
                log.info("an input", extra={"fields": fields})

        def written(done: PoolingJob) -> bytes:
            vectors = [vector for vector in done.vectors if vector is not None]
            return to_json({**write(vectors), "usage": _usage(done)})

        return WholeReply(job, written)


def _head(kind: str, asked: PoolingBody) -> dict[str, Any]:
    name = asked.request_id or secrets.token_hex(12)
    return {"id": f"{kind}-{name}", "created": int(time.time()), "model": asked.model}


def _usage(job: PoolingJob) -> dict[str, int]:
    count = job.usage.prompt_tokens
    return {"prompt_tokens": count, "total_tokens": count}


def _floats(vector: bytes, setup: PoolingSetup, params: PoolingParams) -> list[float]:
    numbers: list[float] = embedding_of(vector, setup, params).tolist()
    return numbers


def _base64(vector: bytes, setup: PoolingSetup, params: PoolingParams) -> str:
    return base64.b64encode(embedding_of(vector, setup, params).tobytes()).decode()


def _plan(
    pairs: Sequence[tuple[str, str]], setup: PoolingSetup, params: PoolingParams
) -> tuple[list[Any], Callable[[list[bytes]], list[float]]]:
    """Return the inputs that pairs need, and what makes scores of their vectors."""
    if setup.task == CLASSIFY:

        def of_pairs(vectors: list[bytes]) -> list[float]:
            return [float(probabilities_of(vector, setup, params)[0]) for vector in vectors]

        return [TextPair(*pair) for pair in pairs], of_pairs
    places = {text: i for i, text in enumerate(dict.fromkeys(t for p in pairs for t in p))}

    def compared(vectors: list[bytes]) -> list[float]:
        return [similarity_of(vectors[places[a]], vectors[places[b]], setup) for a, b in pairs]

    return list(places), compared


def _shown(one: Any) -> str:
    return f"{one.text} | {one.second}" if isinstance(one, TextPair) else str(one)
