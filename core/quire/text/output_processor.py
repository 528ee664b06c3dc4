"""From the engine's token ids to text: detokenize, stop at stop strings, build the outputs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from attrs import define, field, frozen

from quire.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SequenceUpdate,
)
from quire.text.best_of import most_likely
from quire.text.detokenizer import IncrementalDetokenizer
from quire.text.logprob_entries import Entry, entry_of
from quire.text.stop_strings import StopChecker
from quire.text.tokenizer import Tokenizer

MAX_ERROR_CHARS = 300


@frozen(kw_only=True)
class Delta:
    """What is new in one sequence since the last `take_delta`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None = None
    logprobs: list[Entry] | None = None


@frozen(kw_only=True)
class Processed:
    """What a batch of updates changed.

    `changed` are requests with something new, `finished` those of them that are complete,
    `to_finish` the sequences that the engine does not know to be over: (request_id, index).
    """

    changed: tuple[str, ...]
    finished: tuple[str, ...]
    to_finish: tuple[tuple[str, int], ...]


@define
class _Output:
    """One sequence's output so far. `ends[i]` is the text's length after token i."""

    index: int
    detokenizer: IncrementalDetokenizer | None
    checker: StopChecker | None
    min_tokens: int
    include_stop: bool
    logprobs: list[Entry] | None = None  # may be longer than token_ids, of which a stop cuts off
    token_ids: list[int] = field(factory=list)
    texts: list[str] = field(factory=list)
    ends: list[int] = field(factory=list)
    num_chars: int = 0
    num_taken: int = 0
    untaken_texts: list[str] = field(factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    pooled: bytes | None = None

    def add(self, update: SequenceUpdate) -> None:
        """Take the engine's news; may find a stop string and so end the sequence."""
        if update.pooled is not None:
            self.pooled, self.finish_reason = update.pooled, update.finish_reason
            return
        shown = update.token_ids
        if update.finish_reason is FinishReason.STOP and not self.include_stop:
            shown = shown[:-1]
        self._add_tokens(shown)
        if self.finish_reason is not None:
            return
        self.token_ids += update.token_ids[len(shown) :]
        if update.finish_reason is not None:
            self.end(update.finish_reason, update.stop_reason, update.error)

    def end(
        self,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        """Give out what was held back and end, unless that completes a stop string."""
        self._add_text(self.detokenizer.finish() if self.detokenizer else "", finished=True)
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def abort(self) -> None:
        """End with what is there."""
        try:
            self.end(FinishReason.ABORT)
        except Exception as error:  # noqa: BLE001  an abort must end it
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End with an error that is only this sequence's."""
        self.finish_reason, self.stop_reason = FinishReason.ERROR, None
        self.error = f"detokenizing failed: {type(error).__name__}: {error}"[:MAX_ERROR_CHARS]

    @property
    def num_visible(self) -> int:
        """How many tokens are certain to stay: fewer while a stop string may cut some off."""
        end = self.checker.candidate_end if self.checker is not None else None
        if self.finish_reason is not None or end is None:
            return len(self.token_ids)
        return bisect_left(self.ends, end) + 1

    def text(self) -> str:
        """Return the whole text."""
        self.texts = ["".join(self.texts)]
        return self.texts[0]

    def _add_tokens(self, token_ids: tuple[int, ...]) -> None:
        if self.checker is None:
            self.token_ids += token_ids
            if self.detokenizer is not None:
                self._emit(self.detokenizer.push(token_ids))
            return
        assert self.detokenizer is not None, "a stop checker needs text"
        for token_id in token_ids:
            self.token_ids.append(token_id)
            self._add_text(self.detokenizer.push((token_id,)))
            if self.finish_reason is not None:
                return

    def _add_text(self, text: str, *, finished: bool = False) -> None:
        if self.checker is None:
            self._emit(text)
            return
        self.num_chars += len(text)
        if len(self.ends) < len(self.token_ids):
            self.ends.append(self.num_chars)
        search = len(self.token_ids) > self.min_tokens
        certain, stop = self.checker.push(text, finished, search=search)
        self._emit(certain)
        if stop is not None:
            assert self.checker.end is not None
            del self.token_ids[bisect_left(self.ends, self.checker.end) + 1 :]
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop

    def _emit(self, text: str) -> None:
        if text:
            self.texts.append(text)
            self.untaken_texts.append(text)


@define
class _RequestState:
    request: Request
    prompt: str | None
    outputs: list[_Output]
    num_cached_tokens: int = 0
    prompt_logprobs: list[Entry | None] | None = None

    @property
    def is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def completions(self) -> list[CompletionOutput]:
        """Return what is shown of the sequences; of a `best_of` the most likely ones."""
        found = [_completion(output) for output in self.outputs]
        request = self.request
        if request.num_best is None:
            return found
        return most_likely(found, request.num_best, hides_logprobs=request.hides_logprobs)


class OutputProcessor:
    """Every running request's outputs. Not safe for threads: one owner feeds and reads it.

    A stop string found here ends its sequence at the token that completed it: later tokens are
    neither shown nor counted, and `Processed.to_finish` tells the engine's owner to finish it.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _RequestState] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def add_request(self, request: Request, prompt: str | None = None) -> None:
        """Expect updates of a request; `prompt` is its text, where it has one."""
        assert request.request_id not in self._requests, f"{request.request_id} is running"
        outputs = [self._new_output(request, index) for index in range(request.params.n)]
        self._requests[request.request_id] = _RequestState(request, prompt, outputs)

    def process(self, updates: Iterable[SequenceUpdate]) -> Processed:
        """Take one step's updates. Those of requests or sequences that are over are dropped.

        An exception while detokenizing ends its own sequence with FinishReason.ERROR.
        """
        changed: dict[str, None] = {}
        to_finish = []
        for update in updates:
            state = self._requests.get(update.request_id)
            if state is None or state.outputs[update.index].finish_reason is not None:
                continue
            output = state.outputs[update.index]
            state.num_cached_tokens = max(state.num_cached_tokens, update.num_cached_tokens)
            try:
                if update.logprobs is not None or update.prompt_logprobs is not None:
                    self._take_logprobs(state, output, update)
                output.add(update)
            except Exception as error:  # noqa: BLE001  one request's failure is its own
                output.fail(error)
            if output.finish_reason is not None and update.finish_reason is None:
                to_finish.append((update.request_id, update.index))
            changed[update.request_id] = None
        return Processed(
            changed=tuple(changed),
            finished=tuple(r for r in changed if self._requests[r].is_finished),
            to_finish=tuple(to_finish),
        )

    def output(self, request_id: str) -> RequestOutput:
        """Return all that a request has so far. Costs its length: ask when it is needed."""
        state = self._requests[request_id]
        return RequestOutput(
            request_id=request_id,
            prompt=state.prompt,
            prompt_token_ids=list(state.request.prompt_token_ids),
            outputs=state.completions(),
            finished=state.is_finished,
            num_cached_tokens=state.num_cached_tokens,
            prompt_logprobs=state.prompt_logprobs,
            pooled=state.outputs[0].pooled,
        )

    def take_delta(self, request_id: str, index: int) -> Delta:
        """Return what is new in one sequence since it was last taken."""
        output = self._requests[request_id].outputs[index]
        text, output.untaken_texts = "".join(output.untaken_texts), []
        first, output.num_taken = output.num_taken, output.num_visible
        return Delta(
            index=index,
            text=text,
            token_ids=output.token_ids[first : output.num_taken],
            logprobs=None if output.logprobs is None else output.logprobs[first : output.num_taken],
            finish_reason=_value(output.finish_reason),
            stop_reason=output.stop_reason,
            error=output.error,
        )

    def error(self, request_id: str) -> str | None:
        """Return why a request ended with FinishReason.ERROR, None where it did not."""
        outputs = self._requests[request_id].outputs
        return next((output.error for output in outputs if output.error is not None), None)

    def num_cached_tokens(self, request_id: str) -> int:
        """Return how many prompt tokens the prefix cache had."""
        return self._requests[request_id].num_cached_tokens

    def pooled(self, request_id: str) -> bytes | None:
        """Return a request's vector or scores, None where there are none yet."""
        return self._requests[request_id].outputs[0].pooled

    def prompt_logprobs(self, request_id: str) -> list[Entry | None] | None:
        """Return the prompt's log-probabilities, None where they were not asked for."""
        return self._requests[request_id].prompt_logprobs

    def abort(self, request_id: str) -> None:
        """End what still runs of a request with FinishReason.ABORT; its output stays."""
        for output in self._requests[request_id].outputs:
            if output.finish_reason is None:
                output.abort()

    def remove(self, request_id: str) -> RequestOutput:
        """Forget a request and return all that it had."""
        output = self.output(request_id)
        del self._requests[request_id]
        return output

    def _take_logprobs(self, state: _RequestState, output: _Output, update: SequenceUpdate) -> None:
        tokenizer = self._tokenizer if state.request.params.detokenize else None
        if update.prompt_logprobs is not None:
            prompt = zip(state.request.prompt_token_ids, update.prompt_logprobs, strict=True)
            state.prompt_logprobs = [
                None if found is None else entry_of(token_id, found, tokenizer)
                for token_id, found in prompt
            ]
        if update.logprobs is not None and output.logprobs is not None:
            pairs = zip(update.token_ids, update.logprobs, strict=True)
            output.logprobs += [entry_of(token_id, found, tokenizer) for token_id, found in pairs]

    def _new_output(self, request: Request, index: int) -> _Output:
        params = request.params
        detokenizer = None
        if self._tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                request.prompt_token_ids,
                params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        include = params.include_stop_str_in_output
        return _Output(
            index=index,
            detokenizer=detokenizer,
            checker=StopChecker(params.stop, include) if params.stop and detokenizer else None,
            min_tokens=params.min_tokens,
            include_stop=include,
            logprobs=None if params.logprobs is None else [],
        )


def _value(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def _completion(output: _Output) -> CompletionOutput:
    num_visible = output.num_visible
    token_ids = output.token_ids[:num_visible]
    logprobs = cumulative = None
    if output.logprobs is not None:
        logprobs = output.logprobs[:num_visible]
        pairs = zip(token_ids, logprobs, strict=True)
        cumulative = sum(entry[token_id].logprob for token_id, entry in pairs)
    return CompletionOutput(
        index=output.index,
        text=output.text(),
        token_ids=token_ids,
        cumulative_logprob=cumulative,
        logprobs=logprobs,
        finish_reason=_value(output.finish_reason),
        stop_reason=output.stop_reason,
    )
