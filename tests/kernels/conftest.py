"""Compute with one thread; `ops` on a CPU are the PyTorch bodies, which judge the kernels."""

from collections.abc import Iterator

import pytest
import torch

from quire_kernels import with_cpu

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def plain_ops() -> Iterator[None]:
    """Take the C++ kernels out of `ops`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(with_cpu, "kernels", lambda: None)
        yield
