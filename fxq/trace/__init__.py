"""From a Hugging Face class to a graph: all that knows torch.export."""
