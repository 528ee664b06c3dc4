"""The conformance kit: proves an attention backend right, or says what is wrong with it.

Needs the extra `quire[testing]`; nothing of the engine needs this package.
"""

import importlib.util

from quire.errors import ConfigError

if importlib.util.find_spec("hypothesis") is None:
    raise ConfigError(
        "quire.testing needs hypothesis, which is not installed; pip install 'quire[testing]'."
    )

from quire.testing.kit import AttentionBackendTests, check_attention

__all__ = ["AttentionBackendTests", "check_attention"]
