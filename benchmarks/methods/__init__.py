"""The experiments of the Astra paper at a size that runs on a laptop; `__main__.py` describes the command."""
