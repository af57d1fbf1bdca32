"""Weights: the catalog of published models, their download and conversion, model folders, and finding one by name.

Knows the networks' shapes, but not how images are generated. Checkpoints are read without executing anything in them.
"""
