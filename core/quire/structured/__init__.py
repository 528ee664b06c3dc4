"""Constrained output between the doors and grammar engines: checks, processes, caches."""
