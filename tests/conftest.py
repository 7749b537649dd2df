"""Settings of the whole suite."""

from __future__ import annotations

import torch
from hypothesis import settings

# Many small tensors, on machines that do other things too: threads would wait for each other.
torch.set_num_threads(1)

settings.register_profile("suite", deadline=None, max_examples=25)
settings.load_profile("suite")
