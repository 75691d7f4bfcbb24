"""For every test: Triton's interpreter where there is no GPU.

Triton reads the variable when it is imported, which any test module may cause through transformers or
DeepSpeed; so it is set here, before the first of them is collected.
"""

import os

import torch

# With a GPU the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
