"""Which NVIDIA GPU there is, asked without torch and without starting anything on it."""

from __future__ import annotations

import ctypes
import functools
import os
import re


@functools.cache
def capability_here() -> tuple[int, int] | None:
    """Return the compute capability of this machine's GPU, None where there is none.

    Asks NVIDIA's management library, which starts nothing on the GPU. Of several GPUs, the first
    that CUDA_VISIBLE_DEVICES names.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        device = ctypes.c_void_p()
        major, minor = ctypes.c_int(), ctypes.c_int()
        if _find_device(nvml, device) != 0:
            return None
        get = nvml.nvmlDeviceGetCudaComputeCapability
        if get(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
            return None
        return major.value, minor.value
    finally:
        nvml.nvmlShutdown()


def _find_device(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> int:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if re.fullmatch(r"\d+", first):
        return nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(first)), ctypes.byref(device))
    return nvml.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(device))
