"""Quire's own parsers of answers: tool calls and reasoning, one plugin a form."""
