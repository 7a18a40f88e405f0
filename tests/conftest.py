"""Settings shared by all tests: one thread, no network, no display; notebooks last."""
import os

os.environ |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Run the notebooks last: what they change in this process cannot reach another test."""
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")
