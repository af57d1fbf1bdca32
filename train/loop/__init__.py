"""What the training scripts share: flags, accelerator, checkpoints, logs, health checks, signals."""
