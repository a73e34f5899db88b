"""Training of Astra adapters: calibration, subspaces, initialisation, optimisation (Liu et al., arXiv 2602.19111)."""
