"""The pages of `inspect`, `verify` and `serve` in a real browser: pictures for docs/, and what has to hold."""
