"""What each command does, a file for each; its options are in `options`."""
