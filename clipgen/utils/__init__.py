"""Files written whole, downloads, memory limits, the compute thread, processes under torchrun.

Nothing here runs a model; `memory` computes from configurations what one takes."""
