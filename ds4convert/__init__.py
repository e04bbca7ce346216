"""Convert DeepSeek-V4 checkpoints to MLX without losing the multi-token-prediction head."""
