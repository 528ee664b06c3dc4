"""Quantization methods; each folder is one plugin."""
