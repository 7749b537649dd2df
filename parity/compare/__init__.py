"""`python -m parity compare A B`: whether two networks are one function, and where they part if not."""
