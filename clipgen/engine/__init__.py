"""Tokens and pixels for many requests at once: sampling, batching, scheduling, decoding.

It knows embeddings and seeds, but neither prompts nor files."""
