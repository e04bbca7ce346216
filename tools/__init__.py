"""Programs for who works on the project: figures, pictures, checks, training of the demo. Nothing here is installed."""
