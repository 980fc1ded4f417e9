"""Passes: what one is, the facts that order them, specs, and how they run."""
