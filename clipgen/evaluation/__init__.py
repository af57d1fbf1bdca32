"""Metrics of a model: FID, Inception Score, CLIP score, R-precision, caption score.

This package does not know command lines or files of results.
"""
