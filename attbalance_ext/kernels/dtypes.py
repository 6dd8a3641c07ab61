"""The codes of dtypes in the schemas."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the position is the code in `key_dtype`
