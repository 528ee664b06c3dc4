"""Kernels and the operations that models call; importing the package loads nothing."""
