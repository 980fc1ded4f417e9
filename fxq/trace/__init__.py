"""The trace: from a Hugging Face class to a graph; all that knows torch.export.

fake_model: the class on fake tensors. export: its graph, with the help of opaque_calls (scans that are not
looked into) and repeated_layers (those that compute the same are traced once). read_export: the exported
program as a graph of fxq. canonical: one form of matmuls. symbols: symbolic sizes.
"""
