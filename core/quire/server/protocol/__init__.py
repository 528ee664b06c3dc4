"""Bodies of requests: their types, their bounds, and what they ask of the engine."""
