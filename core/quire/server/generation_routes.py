"""The routes that generate: completions, chat completions, responses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.errors import ConfigError, RequestError
from quire.request import SamplingParams
from quire.server.access import combined_salt
from quire.server.answer_forms import with_form
from quire.server.answer_logprobs import TokenBytes, token_id_bytes
from quire.server.answer_parsing import Parsers, with_special_tokens
from quire.server.answers import AnswerOptions, Answers, ChatAnswers, CompletionAnswers
from quire.server.generation import Asked, Generation
from quire.server.json_calls import JsonCallParser
from quire.server.meaning_answers import MeaningAnswers
from quire.server.protocol.chat import ChatCompletionRequest
from quire.server.protocol.completions import CompletionRequest
from quire.server.protocol.parsing import parse
from quire.server.protocol.responses import ResponsesRequest, to_chat_tools, to_messages
from quire.server.protocol.tool_choice import ToolUse
from quire.server.records import record_of
from quire.server.replies import EventReply, WholeReply
from quire.server.requests import body_of
from quire.server.response_answers import ResponseAnswers
from quire.server.response_items import ItemAnswers
from quire.server.service import Service
from quire.server.sources import AnswerSource
from quire.server.stream import Stream
from quire.text.tokenizer import Tokenizer

log = logging.getLogger("quire.server.prompts")


class GenerationRoutes:
    """Handlers of the routes that generate."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        """Complete one prompt or several."""
        asked = parse(await body_of(request, self._service.options), CompletionRequest)
        self._check(asked.model)
        params = asked.sampling_params(self._defaults())
        answers = CompletionAnswers(self._completion_options(asked), self._prompt_text)
        wanted = self._asked(request.scope, asked, asked.prompts(), params)
        generation = await self._begin(request.scope, wanted)
        return self._reply(generation, answers, stream=bool(asked.stream))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = parse(await body_of(request, self._service.options), ChatCompletionRequest)
        generation, answers = await self.begin_chat(request.scope, asked)
        return self._reply(generation, answers, stream=bool(asked.stream))

    async def responses(self, request: Request) -> Response:
        """Answer a text or a conversation in the form of the Responses API."""
        asked = parse(await body_of(request, self._service.options), ResponsesRequest)
        self._check(asked.model)
        params = asked.sampling_params(self._defaults())
        use = asked.tool_use()
        parsers = self._parsers(asked, use)
        options = self._options(asked, num_logprobs=asked.num_logprobs)
        try:
            prompt = await self.render(to_messages(asked), {"tools": to_chat_tools(asked)})
        except RequestError as error:
            field = "input" if error.parameter == "messages" else error.parameter
            raise RequestError(str(error), parameter=field) from error
        answers = ResponseAnswers(options, asked)
        if parsers:
            answers = ItemAnswers(options, asked, parsers, prompt.text)
        params = with_form(with_special_tokens(params, parsers), use, parsers, prompt.text)
        wanted = self._asked(request.scope, asked, [prompt], params)
        generation = await self._begin(request.scope, wanted)
        return self._reply(generation, answers, stream=bool(asked.stream))

    async def begin_chat(
        self, scope: Any, asked: ChatCompletionRequest
    ) -> tuple[Generation, Answers]:
        """Queue a conversation. Raises: RequestError, OverloadedError, ApiError."""
        self._check(asked.model)
        params = asked.sampling_params(self._defaults())
        use = asked.tool_use()
        parsers = self._parsers(asked, use)
        prompt = await self.render(asked.messages, asked.template_options())
        options = self._chat_options(asked)
        answers = ChatAnswers(options)
        if parsers:
            answers = MeaningAnswers(options, parsers, prompt.text)
        params = with_form(with_special_tokens(params, parsers), use, parsers, prompt.text)
        generation = await self._begin(scope, self._asked(scope, asked, [prompt], params))
        return generation, answers

    async def render(self, messages: Any, options: Mapping[str, Any]) -> Any:
        """Return the prompt of a conversation. Raises: RequestError."""
        self._service.check_open()
        try:
            return await self._service.engine.render(messages, **options)
        except ConfigError as error:  # the checkpoint has no template
            raise RequestError(str(error), parameter="messages") from error

    def _parsers(self, asked: ChatCompletionRequest | ResponsesRequest, use: ToolUse) -> Parsers:
        """Return what the answer is read with. Raises: RequestError."""
        tool_call = self._service.tool_call_parser
        if use.is_forced and (tool_call is None or tool_call.call_form is None):
            tool_call = JsonCallParser
        if use.names and tool_call is None:
            _check_text_will_do(asked.tool_choice is not None, use)
        return Parsers(
            reasoning=self._service.reasoning_parser,
            tool_call=tool_call if use.names else None,
            tool_names=use.names,
            is_one_call=use.is_one_call,
            tells_of_calls=not use.is_named,
        )

    def _check(self, model: str) -> None:
        self._service.check_open()
        self._service.check_model(model)
        self._service.frontend.check_generates()

    def _defaults(self) -> dict[str, Any]:
        return self._service.frontend.defaults.sampling_defaults()

    def _asked(self, scope: Any, body: Any, prompts: Any, params: SamplingParams) -> Asked:
        key = scope["state"].get("quire_key")
        return Asked(
            prompts=prompts,
            params=params,
            priority=body.priority or 0,
            cache_salt=combined_salt(key, body.cache_salt) or None,
            generates=not body.wants_no_generation,
        )

    async def _begin(self, scope: Any, asked: Asked) -> Generation:
        generation = await Generation.begin(self._service.engine, asked)
        record_of(scope).generation = generation
        if self._service.options.log_prompts:
            for stream in generation.streams:
                fields = {"request_id": scope["state"]["request_id"], "prompt": _shown(stream)}
                log.info("a prompt", extra={"fields": fields})
        return generation

    def _reply(
        self, generation: Generation, answers: Answers | ResponseAnswers, *, stream: bool
    ) -> Response:
        if not stream:
            return WholeReply(generation, answers.whole)
        source = AnswerSource(generation, answers)
        return EventReply(generation, source, self._service.patience)

    def _completion_options(self, asked: CompletionRequest) -> AnswerOptions:
        return self._options(
            asked,
            num_logprobs=asked.num_logprobs,
            echo=bool(asked.echo),
            generates=not asked.wants_no_generation,
        )

    def _chat_options(self, asked: ChatCompletionRequest) -> AnswerOptions:
        return self._options(asked, num_logprobs=asked.num_logprobs)

    def _options(self, asked: Any, **own: Any) -> AnswerOptions:
        stream_options = asked.stream_options
        return AnswerOptions(
            model=asked.model,
            token_bytes=self._token_bytes(asked, own["num_logprobs"]),
            fingerprint=self._service.fingerprint,
            include_usage=bool(stream_options and stream_options.include_usage),
            continuous_usage=bool(stream_options and stream_options.continuous_usage_stats),
            token_ids=bool(asked.return_token_ids),
            num_prompt_logprobs=asked.prompt_logprobs,
            request_id=asked.request_id,
            **own,
        )

    def _token_bytes(self, asked: Any, num_logprobs: int | None) -> TokenBytes:
        if asked.return_tokens_as_token_ids:
            return token_id_bytes
        return self._tokenizer().token_bytes if num_logprobs is not None else _none

    def _tokenizer(self) -> Tokenizer:
        try:
            return self._service.frontend.require_tokenizer()
        except ConfigError as error:
            raise RequestError(str(error), parameter="logprobs") from error

    def _prompt_text(self, stream: Stream) -> str:
        """Return the text of a prompt to echo, also where it came as token ids."""
        text = stream.output().prompt
        if text is not None:
            return text
        return self._tokenizer().decode(stream.request.prompt_token_ids, False)


def _check_text_will_do(is_auto: bool, use: ToolUse) -> None:
    """Refuse what needs calls to be read where none are. Raises: RequestError."""
    start = "start it with --tool-call-parser NAME"
    if is_auto:
        raise RequestError(
            f"tool_choice is auto, but this server reads no calls; {start}, "
            "or leave tool_choice out: calls are then text.",
            parameter="tool_choice",
        )
    if use.is_strict:
        raise RequestError(
            f"tools has a strict function, but this server reads no calls; {start}, "
            "set tool_choice to required, or strict to false.",
            parameter="tools",
        )


def _shown(stream: Stream) -> str:
    text = stream.output().prompt
    return str(list(stream.request.prompt_token_ids)) if text is None else text


def _none(token_id: int) -> bytes:
    raise AssertionError("no log-probabilities were asked for")
