"""The routes that generate nothing: models, health, tokens, figures."""

from __future__ import annotations

import urllib.parse
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.errors import ConfigError, RequestError
from quire.server.answers import to_json
from quire.server.errors import model_not_found
from quire.server.protocol.parsing import parse
from quire.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from quire.server.requests import body_of
from quire.server.service import Service, model_card
from quire.text.tokenizer import Tokenizer


def json_response(value: Any, status: int = 200) -> Response:
    """Return an answer of JSON."""
    return Response(to_json(value), status_code=status, media_type="application/json")


class PlainRoutes:
    """Handlers of the routes that generate nothing."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Say whether requests are taken on."""
        reason = self._service.why_not_ready()
        if reason is None:
            return json_response({"status": "ok"})
        return json_response({"status": "unavailable", "reason": reason}, 503)

    async def version(self, request: Request) -> Response:
        """Say which version runs."""
        from quire import __version__

        return json_response({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Give the figures to Prometheus."""
        body, kind = self._service.metrics.render()
        return Response(body, headers={"content-type": kind})

    async def models(self, request: Request) -> Response:
        """List the names of the model that is served."""
        cards = [model_card(self._service, name) for name in self._service.model_names]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        name = urllib.parse.unquote(request.path_params["name"])
        if name not in self._service.model_names:
            raise model_not_found(name)
        return json_response(model_card(self._service, name))

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text or a conversation."""
        asked = parse(await body_of(request, self._service.options), TokenizeRequest)
        asked.check()
        self._check_model(asked.model)
        prompt = await self._prompt(asked)
        inputs = self._service.frontend.inputs
        token_ids = await self._service.engine.in_pool(lambda: inputs.token_ids_of(prompt))
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self._service.frontend.max_model_len,
            "tokens": list(token_ids),
        }
        if asked.return_token_strs:
            tokenizer = self._tokenizer()
            answer["token_strs"] = [tokenizer.id_to_token(i) for i in token_ids]
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        asked = parse(await body_of(request, self._service.options), DetokenizeRequest)
        self._check_model(asked.model)
        tokenizer = self._tokenizer()
        try:
            ids = self._service.frontend.inputs.token_ids_of(asked.tokens) if asked.tokens else ()
        except RequestError as error:
            raise RequestError(str(error), parameter="tokens") from error
        text = await self._service.engine.in_pool(lambda: tokenizer.decode(ids, False))
        return json_response({"prompt": text})

    async def _prompt(self, asked: TokenizeRequest) -> Any:
        if asked.given_messages is None:
            return asked.prompt
        try:
            return await self._service.engine.render(asked.messages, **asked.template_options())
        except ConfigError as error:  # the checkpoint has no template
            raise RequestError(str(error), parameter="messages") from error

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            self._service.check_model(name)

    def _tokenizer(self) -> Tokenizer:
        try:
            return self._service.frontend.require_tokenizer()
        except ConfigError as error:
            raise RequestError(str(error)) from error
