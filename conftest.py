"""pytest's settings: the device, one thread, a seed for each test, and what a failure shows."""
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")           # for the processes that tests start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")   # DDP notes what is meant here

import pytest
import torch

if "testing" not in sys.modules:                        # as it is in `python test_math.py`
    pytest.register_assert_rewrite("testing")
from testing import OPTIMIZERS


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the mathematics runs: cpu or cuda")


def pytest_configure(config):
    config.option.showlocals = True                     # a failure tells the round of its loop
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")
    torch.set_num_threads(1)                            # tensors here are small: more would wait


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    """make(model, **options) for each of the optimizers."""
    return OPTIMIZERS[request.param]
