"""From calibration rows to the initial A0 and B0 of every target layer."""
