"""ResNets as data and pure functions, and the ways in and out of them."""
