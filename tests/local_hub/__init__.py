"""A Hub for tests: a small server process on loopback that real huggingface_hub clients talk to over HTTP.

It has models, commits, branches and tags, trees, large files (LFS, basic and multipart), tokens, private and gated
repos, faults on demand, and counters. It has no Xet storage and sends no X-Xet headers: clients fall back to plain
HTTP, and for uploads HF_HUB_DISABLE_XET is needed (`LocalHub.environment` sets it). It has no data sets, spaces, pull
requests or .gitignore rules, and does not look into a card's YAML.
"""

from tests.local_hub.local import LocalHub

__all__ = ["LocalHub"]
