"""Tool-call parser `hermes`: JSON between `<tool_call>` marks; also `qwen` and `demo`."""

from quire import hookimpl
from quire.interfaces.plugin import ToolCallParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Offer `hermes` and `qwen` and `demo`."""
    return [
        ToolCallParserPlugin(
            name="hermes",
            load="quire_parsers.hermes.parser:HermesParser",
            summary="JSON between <tool_call> marks",
        ),
        ToolCallParserPlugin(
            name="qwen",
            load="quire_parsers.hermes.parser:HermesParser",
            summary="the form of Qwen 2.5 and 3, which is that of hermes",
        ),
        ToolCallParserPlugin(
            name="demo",
            load="quire_parsers.hermes.parser:HermesParser",
            summary="the form of the demo, which is that of hermes",
        ),
    ]
