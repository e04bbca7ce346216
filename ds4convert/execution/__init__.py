"""Carrying out a plan: journal, file writer, workers, prefetch, transforms."""
