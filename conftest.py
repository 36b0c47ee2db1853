"""pytest's settings: the device, one thread, a seed for each test, and what a failure shows."""
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")           # for the processes that tests start
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")   # DDP notes what is meant here
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # a GPU that rounds alike each time

import pytest
import torch

if "testing" not in sys.modules:                        # as it is in `python test_math.py`
    pytest.register_assert_rewrite("testing")
from testing import OPTIMIZERS

ON_DEVICE = ("test_math", "test_optimizers")            # the others run on the CPU


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"),
                     help=f"where {' and '.join(ON_DEVICE)} run")


def pytest_configure(config):
    config.option.showlocals = True                     # a failure tells the round of its loop
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")
    config.addinivalue_line("filterwarnings", "ignore:.* of the numbers that it was given")
    config.addinivalue_line("markers", "only_cpu: compares with what runs on the CPU")
    config.addinivalue_line("markers", "only_cuda: shows what only a GPU does")
    torch.set_num_threads(1)                            # tensors here are small: more would wait
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device here; leave the "
                                    "option out to test on the CPU")
        torch.use_deterministic_algorithms(True, warn_only=True)
        for kind in ("flash", "mem_efficient", "cudnn"):       # their gradients differ each time
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
        if hasattr(torch.backends.cudnn, "conv"):       # comparisons without TF32
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        else:
            torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def device_and_seed(request):
    """New tensors stand on the device that --device names, where a test is to run there."""
    device = request.config.getoption("--device")
    marks = {mark.name for mark in request.node.iter_markers()}
    if device == "cpu" and "only_cuda" in marks:
        pytest.skip("needs --device cuda")
    chosen = request.module.__name__ in ON_DEVICE and "only_cpu" not in marks
    if device != "cpu" and chosen:
        torch.set_default_device(device)
    torch.manual_seed(0)
    yield
    if device != "cpu" and chosen:
        torch.set_default_device(None)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    """make(model, **options) for each of the optimizers."""
    return OPTIMIZERS[request.param]
