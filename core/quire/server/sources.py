"""Where the events of a streamed answer come from."""

from __future__ import annotations

from quire.errors import QuireError
from quire.server.answers import Answers
from quire.server.errors import SequenceFailed, to_api_error
from quire.server.generation import Generation


class AnswerSource:
    """A generation, written as it comes."""

    def __init__(self, generation: Generation, answers: Answers) -> None:
        self.generation = generation
        self._answers = answers
        self._has_begun = False
        self._has_ended = False

    async def next(self) -> bytes:
        """Wait for the next events; b"" if the bell was rung for none.

        Raises: StopAsyncIteration at the end, ApiError where the generation failed.
        """
        if self._has_ended:
            raise StopAsyncIteration
        generation, answers = self.generation, self._answers
        try:
            news = await generation.wait()
        except (QuireError, SequenceFailed) as error:
            self._has_ended = True
            raise to_api_error(error) from error
        if len(news) == 1:
            events = answers.pieces(*news[0])
        else:
            events = b"".join(answers.pieces(index, delta) for index, delta in news)
        if not self._has_begun and news:
            self._has_begun = True
            events = answers.begin(generation) + events
        events = answers.with_usage(events, generation.usage)
        if generation.is_finished:
            self._has_ended = True
            events += answers.end(generation.usage)
        return events

    def ring(self) -> None:
        """Make a `next` that waits return."""
        self.generation.news.ring()
