"""Losses of both stages: functions of tensors that return (loss, scalars)."""
