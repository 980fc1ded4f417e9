"""What data flow says of a model's parameters: who multiplies what, what feeds a choice, what meets where.

Nothing here reads a name. Walks stop at the nearest matmul, so each question is linear in the graph.
"""
