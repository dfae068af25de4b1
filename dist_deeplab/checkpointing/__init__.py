"""Checkpoints: what is in one, how it is written and verified, and the folder of a run's."""
