"""Statistics are float32 at least, whatever the precision of the training around them."""
import threading
from contextlib import contextmanager

import torch

# torch 2.9 gave each backend its own setting and forbids to read the old one once they differ
BACKENDS = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv,
            torch.backends.mkldnn.conv] if hasattr(torch.backends.cuda.matmul, "fp32_precision") \
    else []
FULL = ["ieee"] * 4 if BACKENDS else ["highest", False]
lock, users, before = threading.Lock(), 0, []       # the settings are of all threads


def at_least_float32(x):
    """The dtype in which sums over x are taken and kept."""
    return torch.promote_types(x.dtype, torch.float32)


def settings():
    return [backend.fp32_precision for backend in BACKENDS] or [
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


def set_all(values):
    for backend, value in zip(BACKENDS, values):
        backend.fp32_precision = "none"              # inherited, unless that is another value
        if backend.fp32_precision != value:
            backend.fp32_precision = value
    if not BACKENDS:
        torch.set_float32_matmul_precision(values[0])
        torch.backends.cudnn.allow_tf32 = values[1]


@contextmanager
def full_precision(device_type):
    """float32 products in float32: autocast, TF32 and bf16 modes off inside.

    From the first thread that enters to the last that leaves. What is made inside of tensors of a
    type of their own (an image with metadata) is plain.
    """
    global users, before
    with torch.autocast(device_type, enabled=False), torch._C.DisableTorchFunctionSubclass():
        with lock:
            if users == 0:
                before = settings()
                set_all(FULL)
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if users == 0:
                    set_all(before)
