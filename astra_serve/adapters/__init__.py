"""The adapters of one server: their versions on disk, in the engine's memory, and the names that point at them."""
