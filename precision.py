"""Statistics are float32 at least, whatever the precision of the training around them."""
from contextlib import contextmanager

import torch


def at_least_float32(x):
    """The dtype in which sums over x are taken and kept."""
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def full_precision(device_type):
    """float32 products in float32: autocast, TF32 and bf16 modes off inside.

    torch 2.9 gave each backend its own setting and forbids to read the old one once they differ.
    """
    with torch.autocast(device_type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv,
                        torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, value in zip(backends, before):
                    backend.fp32_precision = "none"      # inherited, unless that is another value
                    if backend.fp32_precision != value:
                        backend.fp32_precision = value
        else:
            before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            try:
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
                yield
            finally:
                torch.set_float32_matmul_precision(before[0])
                torch.backends.cudnn.allow_tf32 = before[1]
