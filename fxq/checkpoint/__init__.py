"""The output: what is written, where, in which names, whole or not at all."""
