"""For all tests: the same hypothesis examples on every run, no wall-clock deadlines, one thread for tiny tensors."""

import os

import torch
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("default")

torch.set_num_threads(1)  # a second one costs more than it brings, here and in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
