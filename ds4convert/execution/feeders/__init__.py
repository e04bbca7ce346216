"""Several processes that write files of one run, each feeding rounding workers of its own."""
