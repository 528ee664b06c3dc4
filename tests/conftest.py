"""What holds for all tests: kernels that run here, built before the first test.

Triton's kernels run on a CPU where there is no GPU: in its interpreter. Triton looks at the
variable when a kernel is defined, so it is set before any test is imported.
"""

import contextlib
import os
from pathlib import Path

from quire.errors import BuildError
from quire_kernels.cpu import LIBRARY

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart() -> None:
    """Build the kernels for a CPU, so that `auto` is the same from the first test to the last.

    Where that fails a test of theirs says why; without a compiler they are skipped.
    """
    with contextlib.suppress(BuildError):
        LIBRARY.build(lambda line: print(f"quire build cpu: {line}"))
