"""What a run did to each layer, read back from its folder: `astra-train analyze DIR`."""
