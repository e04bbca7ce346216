"""The model itself, self-contained: what the single file for mlx-lm is made of."""
