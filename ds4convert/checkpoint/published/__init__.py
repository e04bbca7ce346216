"""Checkpoints as people publish them: which file holds a tensor, what is refused and why, what to do."""
