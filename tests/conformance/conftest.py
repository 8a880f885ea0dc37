"""One thread per test process: the sizes are tiny, and processes run side by side."""

import torch

torch.set_num_threads(1)
