"""A run of training: its loop, its budget of time, what it records."""
