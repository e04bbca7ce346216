"""The pages of docs/: that they hang together, and that what they say to type works."""
