"""The sections of the proof: each lists its cells."""
