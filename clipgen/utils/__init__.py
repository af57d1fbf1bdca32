"""Files written whole, downloads, memory limits, the compute thread, processes under torchrun.

Nothing here knows what a model is."""
