"""The bodies of `POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from quire.errors import RequestError
from quire.server.protocol import fields as f
from quire.server.protocol.chat import Conversation


class TokenizeRequest(Conversation, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A text or a conversation whose tokens are asked for."""

    model: f.Name | None = None
    prompt: Annotated[str, Meta(min_length=1, description="a text that is not empty")] | None = None
    add_special_tokens: f.Flag | None = None
    return_token_strs: f.Flag | None = None

    def check(self) -> None:
        """Refuse a body without one source of text. Raises: RequestError."""
        if (self.prompt is None) == (self.given_messages is None):
            raise RequestError(
                "give either prompt or messages, and one of them.", parameter="prompt"
            )


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids whose text is asked for."""

    tokens: f.TokenIds
    model: f.Name | None = None
