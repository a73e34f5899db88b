"""The embedded base model: a small trained Llama in `base/`, its corpus, and three tasks it cannot do yet."""
