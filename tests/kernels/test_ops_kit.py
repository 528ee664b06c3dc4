"""Operations against the conformance kit: PyTorch bodies here, kernels where there is a device."""

from __future__ import annotations

from typing import ClassVar

import pytest
from kernel_cases import DEVICE

from quire.testing import OpsTests
from quire.testing.kit_report import Profile
from quire_kernels import ops as quire_ops

pytest.importorskip("triton")
from quire_kernels import activation, experts, norms, rotary, sampling


class TestOps(OpsTests):
    ops = quire_ops
    device = DEVICE


class TestTritonKernels(OpsTests):
    """A few cases on a CPU: in the interpreter, a launch takes milliseconds a program."""

    ops: ClassVar = {
        "rms_norm": norms.rms_norm,
        "add_rms_norm": norms.add_rms_norm,
        "wide_rms_norm": norms.rms_norm,
        "add_wide_rms_norm": norms.add_rms_norm,
        "silu_mul": activation.silu_mul,
        "gelu_mul": activation.gelu_mul,
        "experts": experts.experts,
        "rotate_and_write": rotary.rotate_and_write,
        "sample": sampling.sample,
    }
    device = DEVICE
    profile = Profile(
        name="few", seconds=10, examples=60, longest=0, shrink_s=0, small=True, least=4
    )
