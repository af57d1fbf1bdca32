"""How good a model is: FID, Inception Score, CLIP score, R-precision, caption score."""
