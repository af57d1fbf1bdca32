"""The three networks: CLIP, the VQGAN and the GPT with its key/value cache.

They know neither files of weights nor how tokens are sampled."""
