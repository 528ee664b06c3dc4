"""Plain C, C++ and CUDA sources as libraries for ctypes: compiled once, kept, never with torch."""

from quire_kernels.native.compilers import CUDA, CXX, Compiler
from quire_kernels.native.library import NativeLibrary, Source

__all__ = ["CUDA", "CXX", "Compiler", "NativeLibrary", "Source"]
