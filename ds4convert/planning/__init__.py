"""What will be written, as values: layouts, recipes, shards, encodings, small files, the plan."""
