"""What goes into the matrices of a model, and what rounding one of them does to what comes out."""
