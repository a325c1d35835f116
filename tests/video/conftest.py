"""Lets the tests of this folder import what lies beside them, and keeps to one thread: sums then have one order."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
