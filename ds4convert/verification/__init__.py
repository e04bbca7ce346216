"""Is it right? Structure, against the source, the head, the verdict."""
