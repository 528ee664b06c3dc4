"""A body that asks for a beam search: what it may say, and what SamplingParams get of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.server.protocol.fields import conflict

if TYPE_CHECKING:
    from quire.server.protocol.generation import GenerationBody

# A checkpoint's recommendations for drawing, which a search does not do.
OF_DRAWS = ("temperature", "top_p", "top_k", "min_p")


def check_beams(body: GenerationBody) -> None:
    """Refuse fields that do not fit together. Raises: RequestError."""
    if body.use_beam_search:
        if body.stream:
            raise conflict("stream", "cannot be used with use_beam_search; set it to false")
        return
    if body.length_penalty not in (None, 1.0):
        raise conflict("length_penalty", "needs use_beam_search; set that to true")
    if body.early_stopping:
        raise conflict("early_stopping", "needs use_beam_search; set that to true")


def beam_values(body: GenerationBody, values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of SamplingParams for a search `best_of`, else `n`, beams wide."""
    found = {
        name: value
        for name, value in values.items()
        if name not in OF_DRAWS or getattr(body, name) is not None
    }
    width = found.pop("best_of", None) or found.get("n", 1)
    found["beam_search"] = {
        "beam_width": width,
        "length_penalty": 1.0 if body.length_penalty is None else body.length_penalty,
        "early_stopping": body.early_stopping or False,
    }
    return found
