"""The page docs/comparison.md: what people do with a command line, in ours and in four other programs."""
