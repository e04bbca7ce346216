"""Text out: a folder opened for decoding, and generation."""
