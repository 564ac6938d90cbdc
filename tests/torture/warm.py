"""What the server of processes imports before it forks: all four scripts and the libraries that they load late."""

import contextlib

import pyarrow.parquet  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  the first optimizer imports it, which takes a second

import chat  # noqa: F401
import plot_loss  # noqa: F401
import preprocess  # noqa: F401
import train  # noqa: F401

torch.set_num_threads(1)
with contextlib.suppress(ImportError):
    import datasets  # noqa: F401
    import datasets.packaged_modules.json.json  # noqa: F401
