"""What a checkpoint is: headers, config, family, inventory, names, tensors, provenance."""
