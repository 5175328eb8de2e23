"""Caption metrics in numpy: what a text scores against references, and how each of its words contributes."""
