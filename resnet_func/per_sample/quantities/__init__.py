"""What is made of per-sample gradients: norms, clipped sums, moments, sketches."""
