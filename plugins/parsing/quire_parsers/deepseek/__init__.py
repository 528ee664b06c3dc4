"""Tool-call parser `deepseek`: V3, R1 and V3.1."""

from quire import hookimpl
from quire.interfaces.plugin import ToolCallParserPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_tool_call_parsers() -> list[ToolCallParserPlugin]:
    """Offer `deepseek`."""
    return [
        ToolCallParserPlugin(
            name="deepseek",
            load="quire_parsers.deepseek.parser:DeepSeekParser",
            summary="the marks of DeepSeek V3, R1 and V3.1",
        ),
    ]
