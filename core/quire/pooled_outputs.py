"""From the float32 numbers that the engine gives to embeddings, probabilities and scores."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
from attrs import frozen

from quire.pooling_params import PoolingParams
from quire.pooling_setup import PoolingSetup

LITTLE_FLOAT32 = "<f4"
LEAST_LENGTH = 1e-12  # a vector of zeros stays one

Outputs = TypeVar("Outputs")


@frozen
class EmbeddingOutput:
    """One embedding; empty where the request failed."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@frozen
class ClassificationOutput:
    """One number for each class; empty where the request failed."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.probs)


@frozen
class ScoringOutput:
    """How well two texts fit; NaN where the request failed."""

    score: float


@frozen(kw_only=True)
class PoolingRequestOutput(Generic[Outputs]):
    """A request and what was made of its input. Names follow vLLM's."""

    request_id: str
    outputs: Outputs
    prompt_token_ids: list[int]
    finished: bool = True


def embedding_of(data: bytes, setup: PoolingSetup, params: PoolingParams) -> np.ndarray:
    """Return the embedding, float32 [size]: cut to `dimensions`, then normalised where asked."""
    vector = np.frombuffer(data, LITTLE_FLOAT32)
    if params.dimensions is not None:
        vector = vector[: params.dimensions]
    normalizes = setup.normalizes if params.normalize is None else params.normalize
    return normalised(vector) if normalizes else vector


def normalised(vector: np.ndarray) -> np.ndarray:
    """Return the vector with length one."""
    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    return (vector / max(length, LEAST_LENGTH)).astype(LITTLE_FLOAT32)


def probabilities_of(data: bytes, setup: PoolingSetup, params: PoolingParams) -> np.ndarray:
    """Return one number a class, float32, after the checkpoint's activation unless refused."""
    scores = np.frombuffer(data, LITTLE_FLOAT32)
    kind = "identity" if params.use_activation is False else setup.activation
    if kind == "identity":
        return scores
    wide = scores.astype(np.float64)
    if kind == "sigmoid":
        # Of minus the absolute value, so that nothing overflows.
        small = np.exp(-np.abs(wide))
        return (np.where(wide >= 0, 1, small) / (1 + small)).astype(LITTLE_FLOAT32)
    powers = np.exp(wide - wide.max())
    return (powers / powers.sum()).astype(LITTLE_FLOAT32)


def similarity_of(first: bytes, second: bytes, setup: PoolingSetup) -> float:
    """Return how alike two embeddings are: by their angle, unless the checkpoint says otherwise."""
    one, other = (
        np.frombuffer(data, LITTLE_FLOAT32).astype(np.float64) for data in (first, second)
    )
    product = float(one @ other)
    if setup.similarity == "dot" and not setup.normalizes:
        return product
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return product / max(lengths, LEAST_LENGTH)
