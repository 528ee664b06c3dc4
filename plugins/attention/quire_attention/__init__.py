"""Attention backends; each folder is one plugin."""
