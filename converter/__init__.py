"""From an Astra adapter to a standard LoRA, and the one on-disk format that all of Astra meets through."""
