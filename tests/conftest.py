"""Let Triton's kernels run on a CPU where there is no GPU: in its interpreter.

Triton looks at this variable when a kernel is defined, so it is set before any test is imported.
"""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
