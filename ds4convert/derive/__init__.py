"""A folder made from a converted folder: graft, relayout, requantize."""
