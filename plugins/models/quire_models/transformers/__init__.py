"""Model `transformers`: any causal model of Transformers, with Quire's attention put into it."""

from __future__ import annotations

import importlib.util

from quire import hookimpl
from quire.interfaces.plugin import ModelPlugin
from quire_models.transformers.config import AnyConfig

QUIRE_API_VERSION = (1, 0)


def _why_unusable() -> str | None:
    if importlib.util.find_spec("transformers") is not None:
        return None
    return "Transformers is not installed; `pip install transformers` adds it"


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `transformers`."""
    return [
        ModelPlugin(
            name="transformers",
            load="quire_models.transformers.model:TransformersModel",
            architectures=(),
            also="quire_models.transformers.config:is_causal_model",
            config_class=AnyConfig,
            why_unusable=_why_unusable,
            runs_remote_code=True,
            summary="what nobody else builds: the class of Transformers itself, slower",
        )
    ]
