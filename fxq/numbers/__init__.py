"""Number formats and the kernels that search and pack: tensor maths, no graph, no file."""
