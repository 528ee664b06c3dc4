"""What the bodies of all routes that generate have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from quire.request import SamplingParams
from quire.server.protocol import fields as f
from quire.server.protocol.beams import check_beams
from quire.server.protocol.fields import conflict as conflict
from quire.server.protocol.sampling import sampling_params
from quire.server.protocol.structured import Constrained


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a stream tells of its usage. Obfuscation is never sent."""

    include_usage: f.Flag | None = None
    continuous_usage_stats: f.Flag | None = None
    include_obfuscation: f.Flag | None = None


class GenerationBody(Constrained, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields of every route that generates; null is as good as absent.

    First OpenAI's, then vLLM's; then those that change nothing, and those that are refused.
    """

    model: f.Name
    temperature: f.Temperature | None = None
    top_p: f.TopP | None = None
    stop: f.Stop | None = None
    seed: f.Integer64 | None = None
    logit_bias: f.LogitBias | None = None
    presence_penalty: f.Penalty | None = None
    frequency_penalty: f.Penalty | None = None
    stream: f.Flag | None = None
    stream_options: StreamOptions | None = None

    top_k: f.TopK | None = None
    min_p: f.MinP | None = None
    repetition_penalty: f.RepetitionPenalty | None = None
    stop_token_ids: f.StopTokenIds | None = None
    ignore_eos: f.Flag | None = None
    min_tokens: f.CountOrZero | None = None
    skip_special_tokens: f.Flag | None = None
    include_stop_str_in_output: f.Flag | None = None
    spaces_between_special_tokens: f.Flag | None = None
    allowed_token_ids: f.AllowedTokenIds | None = None
    forbidden_token_ids: f.ForbiddenTokenIds | None = None
    bad_words: f.BadWords | None = None
    truncate_prompt_tokens: f.PromptLength | None = None
    extra_args: f.ExtraArguments | None = None
    vllm_xargs: f.ExtraArguments | None = None
    prompt_logprobs: f.NumLogprobs | None = None
    return_token_ids: f.Flag | None = None
    return_tokens_as_token_ids: f.Flag | None = None
    priority: f.Integer64 | None = None
    cache_salt: f.CacheSalt | None = None
    request_id: f.RequestId | None = None
    use_beam_search: f.Flag | None = None
    length_penalty: f.LengthPenalty | None = None
    early_stopping: f.EarlyStopping | None = None

    metadata: f.Metadata | None = None
    store: f.Flag | None = None
    service_tier: f.Ignored | None = None
    prompt_cache_key: f.Ignored | None = None
    prompt_cache_retention: f.Ignored | None = None
    safety_identifier: f.Ignored | None = None
    user: f.Ignored | None = None

    prompt_embeds: f.Refused = None
    logits_processors: f.Refused = None
    kv_transfer_params: f.Refused = None
    moderation: f.Refused = None
    prompt_cache_options: f.Refused = None

    @property
    def num_logprobs(self) -> int | None:
        """How many other tokens each token's log-probability comes with; None: no such list."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def wants_no_generation(self) -> bool:
        """Whether the prompt alone is wanted back, with its log-probabilities."""
        return False

    def length_limit(self) -> tuple[str, int | None]:
        """Return the field that limits the answer's tokens, and what SamplingParams gets of it."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse fields that do not fit together. Raises: RequestError."""
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "needs stream; set stream to true or leave it out")
        if self.prompt_logprobs is not None and self.stream:
            raise conflict("prompt_logprobs", "cannot be streamed; set stream to false")
        check_beams(self)
        if self.extra_args is not None and self.vllm_xargs is not None:
            raise conflict("vllm_xargs", "is the same as extra_args; give one of them")
        check_size("extra_args", self.extra_args or self.vllm_xargs)
        if self.bad_words is not None and not all(map(str.strip, self.bad_words)):
            raise conflict("bad_words", "has a text of white space alone; leave it out")

    def check_best_of(self, best_of: int | None, n: int | None) -> None:
        """Refuse a choice among too few sequences, or of a stream. Raises: RequestError."""
        if best_of is None or best_of == (n or 1):
            return
        if best_of < (n or 1):
            raise conflict("best_of", f"is {best_of}, below n; raise it or leave it out")
        if self.stream:
            raise conflict("best_of", "is above n and cannot be streamed; set stream to false")

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return how to choose tokens and when to stop. Raises: RequestError."""
        return sampling_params(self, defaults)


def check_size(name: str, given: Any) -> None:
    """Refuse what a template is told if it has too many values. Raises: RequestError.

    Copying and rendering millions of them would hold everybody up.
    """
    todo = [given]
    count = 0
    while todo:
        value = todo.pop()
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list)):
            count += len(value)
            if count > f.MAX_TEMPLATE_VALUES:
                raise conflict(name, f"has too many values; allowed: {f.MAX_TEMPLATE_VALUES}")
            todo.extend(inner)
