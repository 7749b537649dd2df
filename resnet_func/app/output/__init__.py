"""What people see of a run: the terminal, tables and pictures."""
