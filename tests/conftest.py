"""Settings of the whole suite."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

from resnet_func import calibration

# Many small tensors, on machines that do other things too: threads would wait for each other.
# OMP_NUM_THREADS=4 runs the suite as a machine of more.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
# The same choices on every machine, and nothing measured or written outside of what tests are given.
os.environ[calibration.VARIABLE] = "typical"

settings.register_profile("suite", deadline=None, max_examples=25)
settings.load_profile("suite")
