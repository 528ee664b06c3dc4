"""The exceptions that Quire raises on purpose.

    QuireError
    ├── ConfigError (ValueError)       an option, a folder or a config.json that cannot be used
    │   └── CheckpointError            a file of weights that is missing, damaged or does not match
    ├── RequestError (ValueError)      one request that cannot be served; the engine goes on
    ├── PluginError                    a plugin that cannot be loaded or breaks its contract
    ├── KernelError                    a kernel that cannot run here or gave a wrong result
    ├── OutOfBlocks                    no free KV block; the caller's state is unchanged
    └── EngineDeadError                the engine stopped; every waiting request ends with it

Each message says what was given, what is allowed and what to do, in one line.
"""


class QuireError(Exception):
    """Root of the tree. `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(QuireError, ValueError):
    """Report an option, folder or config.json that cannot be used."""

    exit_code = 2


class CheckpointError(ConfigError):
    """Report a file of weights that is missing, damaged or does not match the model."""


class RequestError(QuireError, ValueError):
    """Refuse one request; the engine and all other requests go on.

    `parameter` names the field that is wrong, or None where no single one is.
    """

    exit_code = 2

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PluginError(QuireError):
    """Report a plugin that cannot be loaded or breaks its contract."""

    exit_code = 2


class KernelError(QuireError):
    """Report a kernel that cannot run on this machine or gave a wrong result."""


class OutOfBlocks(QuireError):
    """Report that too few KV blocks are free; the caller's state is unchanged."""


class EngineDeadError(QuireError):
    """Report that the engine stopped; `__cause__` holds the reason."""
