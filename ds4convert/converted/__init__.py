"""What was written: the manifest, a converted folder's modules and tensors, its records."""
