"""Downloading repos: whole files, or the parts that a selection of tensors needs."""
