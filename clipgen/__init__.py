"""Language-free text-to-image: a CLIP embedding becomes VQGAN tokens, the tokens become images, CLIP picks the best."""

__version__ = "0.1.0"
