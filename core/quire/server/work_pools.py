"""Threads for what would keep the event loop: tokenizing, and forms that are compiled first."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from quire.request import SamplingParams
from quire.text.input_processor import RenderedChat
from quire.text.pooling_input import TextPair

# What is shorter is tokenized at once: a thread costs more, and waits for its turn.
INLINE_CHARS = 4096
INLINE_ENTRIES = 16


class WorkPools:
    """Forms have threads of their own, some a child, so that texts never wait for them."""

    def __init__(self, *, for_texts: int, for_forms: int) -> None:
        self.texts = ThreadPoolExecutor(for_texts, "quire-tokenizer")
        self._forms = ThreadPoolExecutor(for_forms, "quire-forms")

    def choose(self, prompt: Any, params: Any, *, knows_form: bool) -> Executor | None:
        """Return where a request is checked and tokenized; None: at once, which takes less time."""
        if isinstance(params, SamplingParams):
            if params.structured_outputs is not None and not knows_form:
                return self._forms
            if params.num_listed > INLINE_ENTRIES:
                return self.texts
        prompt = prompt.text if isinstance(prompt, RenderedChat) else prompt
        is_short = isinstance(prompt, (str, list, tuple, TextPair)) and len(prompt) <= INLINE_CHARS
        return None if is_short else self.texts

    def shutdown(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        for pool in (self.texts, self._forms):
            pool.shutdown(wait=False, cancel_futures=True)
