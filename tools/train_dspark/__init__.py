"""Trainer of the demo's DSpark head in `manifests/demo/dspark`; see README.md in this folder."""
