"""Folders of object stores: `s3://`, `gs://`, `az://`."""
