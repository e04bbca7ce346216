"""Runs a converted folder: backbone, head, draft/verify decoding. Knows nothing about conversion."""
