"""Plain C, C++ and CUDA sources as libraries for ctypes: compiled once, kept, never with torch."""

from quire_kernels.native.compilers import CUDA, CXX, Compiler, first_error
from quire_kernels.native.gpu import capability_here
from quire_kernels.native.library import NativeLibrary, Source, cache_folder

__all__ = [
    "CUDA",
    "CXX",
    "Compiler",
    "NativeLibrary",
    "Source",
    "cache_folder",
    "capability_here",
    "first_error",
]
