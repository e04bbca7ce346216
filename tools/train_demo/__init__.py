"""Trainer of the demo checkpoint in `manifests/demo`; see README.md in this folder."""
