"""Checkpoints to try things with: random ones of any size, and the trained one that comes along."""
