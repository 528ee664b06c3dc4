"""Samplers and logits processors; each folder is one plugin."""
