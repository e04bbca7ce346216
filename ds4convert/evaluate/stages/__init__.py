"""What a stage of a layer-wise run multiplies with."""
