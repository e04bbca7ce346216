"""`verify` by several processes at once."""
