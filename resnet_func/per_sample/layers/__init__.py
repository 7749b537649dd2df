"""What is known of kinds of layers: their inputs and cotangents, and how to contract those."""
