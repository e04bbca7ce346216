"""What the program knows without a checkpoint: what it can write, what a Mac can hold, and on what it runs."""
