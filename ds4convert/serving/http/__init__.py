"""HTTP: bytes, framing, who may use it, answers."""
