"""The conformance kit: proves a plugin or an operation right, or says what is wrong with it.

Needs the extra `quire[testing]`; nothing of the engine needs this package.
"""

from quire.errors import ConfigError

try:
    import hypothesis as _hypothesis  # noqa: F401 - asked here, so that one line can tell
except ImportError as missing:
    raise ConfigError(
        "quire.testing needs hypothesis, which is not installed; pip install 'quire[testing]'."
    ) from missing

from quire.testing.kit import AttentionBackendTests, check_attention
from quire.testing.kit_grammar import GrammarEngineTests, check_grammar
from quire.testing.kit_model import ModelTests, check_model
from quire.testing.kit_ops import OpsTests, check_ops
from quire.testing.kit_parser import ReasoningParserTests, ToolCallParserTests, check_parser
from quire.testing.kit_processor import LogitsProcessorTests, check_processor
from quire.testing.kit_quantization import QuantizationMethodTests, check_quantization
from quire.testing.kit_sampler import SamplerTests, check_sampler

__all__ = [
    "AttentionBackendTests",
    "GrammarEngineTests",
    "LogitsProcessorTests",
    "ModelTests",
    "OpsTests",
    "QuantizationMethodTests",
    "ReasoningParserTests",
    "SamplerTests",
    "ToolCallParserTests",
    "check_attention",
    "check_grammar",
    "check_model",
    "check_ops",
    "check_parser",
    "check_processor",
    "check_quantization",
    "check_sampler",
]
