"""Conversion of adapters into standard LoRAs, and the on-disk formats that all packages share."""
