"""A model measured: decode runs, teacher forcing, wiring, references, layer by layer."""
