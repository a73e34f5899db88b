"""The embedded base model `base/`, a small pre-trained Llama, with its corpus and three tasks for adapters."""
