"""The processes of a run: torchrun starts one for each GPU, and they meet here.

    stop = Stop()
    with stop.listening():
        ranks = start("auto", stop)            # one process, or all that torchrun started
        model = ranks.wrap(model)
        problems = ranks.gather(problem)       # [that of rank 0, that of rank 1, ...] on every rank

All ranks hold the same parameters and take the same decisions at the same step: whatever only one
of them can know (a signal, a damaged image, the clock) is gathered before anyone acts on it.
"""
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from download import DataError


class UsageError(Exception):
    """Its message is the one sentence for the user; exit status 2."""


class Diverged(Exception):
    """Its message is the one sentence for the user; exit status 1."""


def is_first():
    """Whether this process is the first of its run; what is alone is, whatever set RANK."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def tell(*words):
    """A line on the error output, of the first rank."""
    if is_first():
        print(*words, file=sys.stderr, flush=True)


class Ranks(NamedTuple):
    """This process among those of the run; one alone needs no process group."""
    device: torch.device = torch.device("cpu")
    rank: int = 0
    world: int = 1
    local: int = 0               # among those of this machine
    group: Any = None            # of gloo, also beside NCCL: for what the hosts tell each other

    def gather(self, value):
        """[value of rank 0, value of rank 1, ...] on every rank, of anything that pickle takes."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def highest(self, number):
        """The largest of all ranks' whole numbers."""
        if self.world > 1:
            number = torch.tensor(int(number))
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return int(number)

    def total(self, tensor):
        """The sum of all ranks' tensors; the hosts need not wait for it."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def together(self, work):
        """What work() returns; if it fails on any rank, the same exception on all of them.

        A rank that fails waits here for the others, so nothing in work() may wait for another rank.
        """
        result = problem = None
        try:
            result = work()
        except (UsageError, DataError, OSError) as error:
            problem = UsageError(str(error))
        except KeyboardInterrupt as interrupt:
            problem = interrupt
        for problem in self.gather(problem):
            if problem is not None:
                raise problem
        return result

    def agree(self, facts):
        """Raise UsageError on all ranks unless the facts, a dict, are the same on all of them.

        With other counts of images they would take other numbers of steps, and wait for ever.
        """
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            differ = [f"{name} ({first.get(name)} on rank 0, {other.get(name)} on rank {rank})"
                      for name in {**first, **other} if first.get(name) != other.get(name)]
            if differ:
                raise UsageError(f"the processes differ in {', '.join(differ)}: give all of them "
                                 "the same command and the same data")

    def wrap(self, model):
        """The model in DDP, if there are others to average its gradients with.

        After its first backward pass DDP puts its buckets in the order in which gradients came.
        Three and more ranks add in an order that follows from the place in a bucket, so the first
        step of a resumed run would round differently from that of a run that went on. Hence the
        first pass is one that has nothing to do with training.
        """
        if self.world == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        model.forward = lambda: sum(p.sum() for p in model.parameters() if p.requires_grad)
        wrapped().backward()
        del model.forward                      # the class's own is back
        for p in model.parameters():
            p.grad = None
        return wrapped

    def shard(self, model, kinds):
        """The model cut by fully_shard: modules of these kinds, and the rest, are each whole only
        while they run. Then all ranks are to run it equally often, in evaluation too."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*(m for m in model.modules() if isinstance(m, kinds)), model):
            fully_shard(module, mesh=mesh)
        return model

    @torch.no_grad()
    def average_buffers(self, model):
        """Give all ranks the mean of their BatchNorm statistics (in float64 equal ones stay so)."""
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not buffers:
            return
        flat = self.total(torch.cat([buffer.double().flatten() for buffer in buffers]))
        means = (flat / self.world).split([buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means):
            buffer.copy_(mean.view_as(buffer))


def whole_state(model, optimizer):
    """The states of a sharded model and its optimizer, whole on the first rank, from all ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    return get_state_dict(model, optimizer, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True))


def set_whole_state(model, optimizer, model_state, state):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state,
                   options=StateDictOptions(full_state_dict=True))


def find_device(text):
    """The device that --device names; auto takes a GPU where there is one."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind, _, number = text.partition(":")
    kind = next(d for d in there if there[d]) if kind == "auto" else kind
    if not there[kind]:
        raise UsageError(f"--device {text}: PyTorch finds none here; --device cpu works")
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(f"--device {text}: PyTorch finds {torch.cuda.device_count()} of them, "
                         "counted from 0")
    return torch.device(f"{kind}:{number}" if number else kind)


def from_environment(name, default):
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"the environment variable {name} is {text!r}, which is no number: unset "
                         "it, or start with torchrun, which sets it")
    return int(text)


def start(device, stop):
    """This process among the others, if torchrun or what sets its variables began it; or alone."""
    if from_environment("SLURM_NTASKS", 1) > 1 and "WORLD_SIZE" not in os.environ:
        raise UsageError(f"srun started {os.environ['SLURM_NTASKS']} processes that do not know "
                         "of each other: let it start one torchrun on each machine (srun --ntasks-"
                         "per-node=1 torchrun --nnodes ... --nproc_per_node ...), or unset "
                         "SLURM_NTASKS if this process is the only one")
    rank, world, local = (from_environment(name, default) for name, default
                          in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    found = find_device(device)
    if world == 1:
        if found.index is not None:
            torch.cuda.set_device(found)
        return Ranks(found)
    if found.type == "mps":
        raise UsageError(f"{world} processes cannot share this GPU: use one, or --device cpu")
    if found.index is not None:
        raise UsageError(f"--device {device}: each of {world} processes takes a GPU of its own; "
                         "--device cuda lets them, and CUDA_VISIBLE_DEVICES chooses which")
    if found.type == "cuda":
        if max(local, from_environment("LOCAL_WORLD_SIZE", 1) - 1) >= torch.cuda.device_count():
            raise UsageError("torchrun started more processes than the "
                             f"{torch.cuda.device_count()} GPUs here: give it --nproc_per_node of "
                             "at most that")
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    stop.watch()
    try:
        dist.init_process_group(
            "nccl" if found.type == "cuda" and dist.is_nccl_available() else "gloo")
    except (ValueError, dist.DistError) as error:
        raise UsageError(f"the {world} processes do not find each other "
                         f"({str(error).splitlines()[0]}): start them with torchrun")
    return Ranks(found, rank, world, local, dist.new_group(backend="gloo"))


class Stop:
    """The signals that end a run: SIGTERM, Ctrl-C, SIGUSR1, which SLURM can send beforehand, and
    SIGHUP, of a terminal that is closed (unless nohup has it ignored).

    While a step is under way (noting) the first one is noted and acted upon after the step;
    elsewhere, and the second time, it raises KeyboardInterrupt.
    """
    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
               if hasattr(signal, name)]       # Windows has but two

    def __init__(self):
        self.number, self.noting, self.saving, self.heard, self.wakeup = 0, False, False, 0, None

    def __call__(self, number, frame):
        first, self.number, self.heard = not self.number, number, self.heard + 1
        if not (self.noting and first):
            raise KeyboardInterrupt(number)

    def between(self, batches, alone=True):
        """The batches, unless a signal has been noted: where nothing is half done between two, and
        no other rank waits for this one."""
        for batch in batches:
            if self.number and alone:
                raise KeyboardInterrupt(self.number)
            yield batch

    @contextlib.contextmanager
    def listening(self):
        before = {number: signal.signal(number, self) for number in self.SIGNALS
                  if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.wakeup is not None:
                signal.set_wakeup_fd(-1)
                self.wakeup.close()            # which ends the thread

    def watch(self):
        """Also end a process that hangs in torch, where it waits for another rank.

        Python calls a handler only between two of its own instructions, so such a process never
        hears a signal. The byte that the interpreter writes at once wakes this thread up instead.
        """
        reader, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)

        def wait():
            number = reader.recv(1)
            while number and number[0] not in self.SIGNALS:     # a worker's end, SIGCHLD
                number = reader.recv(1)
            if number:
                # a step of a large network takes its time, and torchrun kills after 30 s
                begun = time.monotonic()
                while self.saving or time.monotonic() < begun + (
                        20 if self.noting or self.heard else 4):
                    time.sleep(0.1)
                if self.wakeup.fileno() >= 0:
                    print("stopped while waiting for another process", file=sys.stderr, flush=True)
                    os._exit(128 + number[0])
        threading.Thread(target=wait, daemon=True).start()
