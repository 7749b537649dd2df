"""What `scores` and `attribute` compute of a run."""
