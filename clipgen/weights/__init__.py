"""Weights: the catalog of published models, download, conversion, folders of weights, precision.

Nothing here draws; foreign checkpoints are read without executing them."""
