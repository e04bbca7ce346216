"""What family files are made of: rows, kinds of head, keys of nested configs, and the modules that rows come to."""
