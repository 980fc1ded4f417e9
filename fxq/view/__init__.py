"""The graph for people: folded text, selections, reasons, a page."""
