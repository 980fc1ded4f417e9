"""Running a graph: streaming over batches, statistics, simulation, weights on their way."""
