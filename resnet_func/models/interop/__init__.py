"""The ways in and out: modules, `state_dict`s, checkpoints of others, networks by name."""
