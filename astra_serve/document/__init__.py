"""The document that says which adapters are served: its model, and its text where it lies."""
