"""`serve`: an OpenAI-compatible server, every request decoded with the MTP head where the folder has one.

A request passes, in this order: `handler` (HTTP, one connection) with `bodies` (its bytes) and `access` (hosts,
origins, keys, the log); `validation` (its fields) with `thinking` and `history`; `exchange`, which runs it in the
decoder of `seam` (the thread that owns the model, and all that is used of mlx-lm) with `prompting`; `reply` splits what
the model says, `responses` writes it in OpenAI's forms. `metrics` counts; `server` starts and drains.
"""
