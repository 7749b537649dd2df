"""Proofs that the functions are the networks."""
