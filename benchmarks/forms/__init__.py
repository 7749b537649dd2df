"""What is compared: networks, our forms of a step, and those of others."""
