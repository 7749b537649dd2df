"""What every benchmark measures with, and what it leaves behind."""
