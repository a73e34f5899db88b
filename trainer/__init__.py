"""Train an Astra adapter: calibrate, find each layer's tail eigenvectors, start there, train (arXiv 2602.19111)."""
