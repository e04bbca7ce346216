"""The outside, read safely: byte sources, bounded opening, digests, strict JSON, what drives cannot do."""
