"""Training images in an order that depends on the seed alone."""
