"""`serve`: an OpenAI-compatible server on mlx-lm's own, with the MTP head drafting.

`seam` is the only place where mlx-lm's server is changed; `validation` decides what reaches it; `handler` is HTTP;
`metrics` counts; `server` starts and drains.
"""
