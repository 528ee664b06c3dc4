"""The bodies of the routes that give vectors and scores: embeddings, rerank, score, classify."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import attrs
import msgspec
from msgspec import Meta

from quire.errors import RequestError
from quire.pooling_params import PoolingParams
from quire.server.protocol import fields as f

MAX_INPUTS = 2**14
_SEVERAL = Meta(min_length=1, max_length=MAX_INPUTS)

Text = Annotated[str, Meta(min_length=1)]
Ids = Annotated[list[f.TokenId], Meta(min_length=1)]
Inputs = Annotated[
    Text | Annotated[list[Text | f.TokenId | Ids], _SEVERAL],
    Meta(description="a text, texts, token ids from 0, or lists of them; none empty"),
]
Texts = Annotated[
    Text | Annotated[list[str], _SEVERAL], Meta(description="a text, or a list of texts")
]


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: str


Documents = Annotated[
    list[str | Document], _SEVERAL, Meta(description="texts, or objects with a text")
]


class PoolingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all of them have."""

    model: f.Name
    truncate_prompt_tokens: f.PromptLength | None = None
    priority: f.Integer64 | None = None
    cache_salt: f.CacheSalt | None = None
    request_id: f.RequestId | None = None
    user: f.Ignored | None = None

    def pooling_params(self) -> PoolingParams:
        """Return how inputs become vectors or scores. Raises: RequestError."""
        names = {a.name for a in attrs.fields(PoolingParams)} & set(self.__struct_fields__)
        return PoolingParams(**{name: getattr(self, name) for name in names})


class InputsBody(PoolingBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A body with one input or several."""

    input: Inputs

    def inputs(self) -> list[Any]:
        """Return each input: a text, or a list of token ids. Raises: RequestError."""
        given: Any = self.input
        if isinstance(given, str):
            return [given]
        kinds = set(map(type, given))
        if len(kinds) != 1:
            raise RequestError(
                "input mixes texts, token ids and lists; give entries of one kind.",
                parameter="input",
            )
        return [given] if kinds == {int} else list(given)


class EmbeddingRequest(InputsBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Inputs whose embeddings are asked for."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: f.Count | None = None
    normalize: f.Flag | None = None
    prompt_name: f.Name | None = None


class ScoresBody(PoolingBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A body that asks for scores."""

    use_activation: f.Flag | None = None


class ClassifyRequest(InputsBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Inputs whose classes are asked for."""

    use_activation: f.Flag | None = None


class ScoreRequest(ScoresBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Texts that are compared: one with several, or as many with as many."""

    text_1: Texts
    text_2: Texts


class RerankRequest(ScoresBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Documents to be put in order by how well they fit a query, as Jina and Cohere have it."""

    query: f.Name
    documents: Documents
    top_n: f.Count | None = None
    return_documents: f.Flag | None = None

    def texts(self) -> list[str]:
        """Return the text of each document."""
        return [d if isinstance(d, str) else d.text for d in self.documents]
