"""The offline door to vectors and scores: `LLM.embed`, `LLM.classify` and `LLM.score`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import evolve

from quire.errors import RequestError
from quire.frontend import Frontend
from quire.pooled_outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    embedding_of,
    probabilities_of,
    similarity_of,
)
from quire.pooling_params import PoolingParams
from quire.pooling_setup import CLASSIFY, EMBED, PoolingSetup
from quire.request import RequestOutput
from quire.text.pooling_input import TextPair, check_scores, pair_up

Params = PoolingParams | Sequence[PoolingParams] | None


class PoolingDoor(abc.ABC):
    """What `LLM` offers where the model gives vectors or scores, with vLLM's arguments."""

    frontend: Frontend

    @abc.abstractmethod
    def run_pooling(
        self, prompts: Sequence[Any], params: Sequence[PoolingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Run all inputs and return their outputs in order. Raises: RequestError."""

    def embed(
        self,
        prompts: Any,
        pooling_params: Params = None,
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """Return the embedding of one input or several, in order.

        An input is a text, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`.
        One that is longer than the model takes is refused, unless `truncate_prompt_tokens` says how
        many of its first tokens are kept; -1: as many as the model takes. `prompt_name` names a
        prompt of the checkpoint that goes before a text.
        Raises: RequestError before anything runs if one of the inputs cannot be served;
        EngineDeadError if the engine stopped.
        """
        setup = self.frontend.pooling_setup(EMBED)
        items = _inputs(prompts)
        given = {"truncate_prompt_tokens": truncate_prompt_tokens, "prompt_name": prompt_name}
        params = _params_of(pooling_params, len(items), given)
        outputs = self.run_pooling(items, params, use_tqdm)
        return [
            _answer(o, EmbeddingOutput(_numbers(embedding_of, o, setup, p)))
            for o, p in zip(outputs, params, strict=True)
        ]

    def classify(
        self,
        prompts: Any,
        pooling_params: Params = None,
        use_tqdm: bool = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """Return a number for each class of one input or several, in order.

        Raises: as `embed`.
        """
        setup = self.frontend.pooling_setup(CLASSIFY)
        items = _inputs(prompts)
        given = {"truncate_prompt_tokens": truncate_prompt_tokens}
        params = _params_of(pooling_params, len(items), given)
        outputs = self.run_pooling(items, params, use_tqdm)
        return [
            _answer(o, ClassificationOutput(_numbers(probabilities_of, o, setup, p)))
            for o, p in zip(outputs, params, strict=True)
        ]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """Return how well each text of `data_2` fits the one of `data_1`, or each its own.

        A model with one score reads both together; of one that embeds, vectors are compared.
        Raises: as `embed`; RequestError where the texts cannot be paired.
        """
        setup = self.frontend.pooling_setup(CLASSIFY, EMBED)
        check_scores(setup)
        pairs = pair_up(data_1, data_2)
        given = {"truncate_prompt_tokens": truncate_prompt_tokens}
        (params,) = _params_of(pooling_params, 1, given)
        if setup.task == CLASSIFY:
            inputs = [TextPair(*pair) for pair in pairs]
            outputs = self.run_pooling(inputs, [params] * len(inputs), use_tqdm)
            return [
                _answer(
                    o, ScoringOutput((*_numbers(probabilities_of, o, setup, params), math.nan)[0])
                )
                for o in outputs
            ]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found = self.run_pooling(texts, [params] * len(texts), use_tqdm)
        by_text = dict(zip(texts, found, strict=True))
        return [_compared(by_text[one], by_text[other], setup) for one, other in pairs]


def _inputs(prompts: Any) -> list[Any]:
    """Return a list of inputs; a list of token ids is one."""
    if isinstance(prompts, (str, Mapping, TextPair)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        kind = type(prompts).__name__
        raise RequestError(
            f"prompts is a {kind}; allowed: an input or a list of inputs.", parameter="input"
        )
    is_ids = bool(prompts) and all(type(item) is int for item in prompts)
    return [list(prompts)] if is_ids else list(prompts)


def _params_of(given: Params, count: int, changes: Mapping[str, Any]) -> list[PoolingParams]:
    named = {name: value for name, value in changes.items() if value is not None}
    if given is None or isinstance(given, PoolingParams):
        given = [given or PoolingParams()] * count
    params = list(given)
    if len(params) != count or not all(isinstance(one, PoolingParams) for one in params):
        raise RequestError(
            f"pooling_params has to be one PoolingParams, or {count}: one an input.",
            parameter="pooling_params",
        )
    return [evolve(one, **named) if named else one for one in params]


def _answer(output: RequestOutput, outputs: Any) -> PoolingRequestOutput[Any]:
    return PoolingRequestOutput(
        request_id=output.request_id,
        outputs=outputs,
        prompt_token_ids=output.prompt_token_ids,
    )


def _numbers(
    make: Callable[..., Any], output: RequestOutput, setup: PoolingSetup, params: PoolingParams
) -> list[float]:
    """Return what is made of the engine's numbers, nothing where the request failed."""
    if output.pooled is None:
        return []
    numbers: list[float] = make(output.pooled, setup, params).tolist()
    return numbers


def _compared(
    one: RequestOutput, other: RequestOutput, setup: PoolingSetup
) -> PoolingRequestOutput[ScoringOutput]:
    score = math.nan
    if one.pooled is not None and other.pooled is not None:
        score = similarity_of(one.pooled, other.pooled, setup)
    return PoolingRequestOutput(
        request_id=other.request_id,
        outputs=ScoringOutput(score),
        prompt_token_ids=[*one.prompt_token_ids, *other.prompt_token_ids],
    )
