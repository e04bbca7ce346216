"""Numbers: codecs, block scales, packing, and the rounding of rows."""
