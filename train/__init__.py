"""Training: data, losses, the two stages, and the mini model's own data and CLIP."""
