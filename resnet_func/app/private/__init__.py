"""Training with differential privacy: its guarantee, its secret seeds, its steps."""
