"""Quire, an LLM inference engine whose every hot part is a plugin.

The public names are imported when they are first used, so that `import quire` costs nothing and
loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.beam_search import BeamSearchParams as BeamSearchParams
    from quire.hooks.hookspecs import hookimpl as hookimpl
    from quire.llm import LLM as LLM
    from quire.pooling_params import PoolingParams as PoolingParams
    from quire.request import CompletionOutput as CompletionOutput
    from quire.request import RequestOutput as RequestOutput
    from quire.request import SamplingParams as SamplingParams
    from quire.server.async_engine import AsyncEngine as AsyncEngine

    __version__: str

_HOMES = {
    "LLM": "quire.llm",
    "AsyncEngine": "quire.server.async_engine",
    "PoolingParams": "quire.pooling_params",
    "SamplingParams": "quire.request",
    "RequestOutput": "quire.request",
    "CompletionOutput": "quire.request",
    "BeamSearchParams": "quire.beam_search",
    "hookimpl": "quire.hooks.hookspecs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(_unknown(name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("quire")
    except PackageNotFoundError:
        return "0+not-installed"


def _unknown(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, __all__, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"module 'quire' has no attribute {name!r}.{hint}"
