"""Reasoning parsers `qwen3` and `deepseek_r1`: thoughts between `<think>` marks."""

from quire import hookimpl
from quire.interfaces.plugin import ReasoningParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_reasoning_parsers() -> list[ReasoningParserPlugin]:
    """Offer `qwen3` and `deepseek_r1`, which differ where no mark begins the thoughts."""
    return [
        ReasoningParserPlugin(
            name="qwen3",
            load="quire_parsers.think.parser:ThinkParser",
            summary="thoughts between <think> marks; none without the mark that opens",
        ),
        ReasoningParserPlugin(
            name="deepseek_r1",
            load="quire_parsers.think.parser:DeepSeekR1Parser",
            summary="thoughts up to </think>, also without the mark that opens",
        ),
    ]
