"""Several processes as one run: joining under torchrun, and rows dealt to ranks."""
