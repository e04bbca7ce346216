"""One model over several processes or machines, started by mlx.launch."""
