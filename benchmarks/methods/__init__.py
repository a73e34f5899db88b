"""Does Astra do what its paper says? Its experiments at a size that runs on a laptop: see `__main__.py`."""
