"""A model and an attention backend for Quire, in a package of its own."""
