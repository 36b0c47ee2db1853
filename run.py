"""What a run is, whatever it trains: its beginning, its epochs, its end; the exit status.

    run = Run(folder, config, parts, args, ranks, stop)        # begun, or restored from the folder
    for epoch in range(len(run.rows), config["epochs"]):
        with run.epoch(epoch) as progress:                     # saves whatever ends it
            for batch in run.steps(batches, steps, epoch):     # saves and stops between two of them
                ...
                progress.add(loss, len(batch))
        run.add(text, lr=lr, ...)                              # a row of log.csv, a checkpoint
    record = run.finish()

One process owns a folder; in it are config.json, log.csv, checkpoint.pt and record.json, each
written whole or not at all. A step's random numbers come from (seed, epoch, step, rank), so a
checkpoint needs no generator's state, and a resumed run takes the very steps of one that went on.
"""
import contextlib
import io
import math
import os
import re
import signal
import statistics
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from download import DataError
from folder import check_folder, lock, read_checkpoint, write_file, write_json
from ranks import Diverged, Stop, UsageError, is_first, set_whole_state, tell, whole_state
from report import print_anything, time_in_words


def seed_of(*numbers):
    """A seed from (seed, epoch, ...)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])


class Progress:
    """A running epoch: steps taken, seconds, of which waited for data, and this rank's sums."""

    def __init__(self, ranks, saved=None):
        double = torch.float32 if ranks.device.type == "mps" else torch.float64
        self.ranks, self.step, self.seconds, self.waited = ranks, 0, 0.0, 0.0
        self.sums = torch.zeros(3, dtype=double, device=ranks.device)      # loss, hits, samples
        if saved:
            self.step, self.seconds, self.waited = saved["step"], saved["seconds"], saved["waited"]
            sums = saved["sums"]
            if len(sums) != ranks.world:       # other ranks than then: the first takes it all
                sums = [list(map(sum, zip(*sums)))] + [[0.0] * 3] * (ranks.world - 1)
            self.sums.copy_(torch.tensor(sums[ranks.rank], dtype=torch.float64))

    def add(self, loss, count, hits=0):
        """Count in the mean loss and the hits of so many samples; nothing is read from a GPU."""
        loss = loss.detach()
        self.sums += torch.stack([loss * count, torch.as_tensor(hits).to(loss),
                                  torch.full_like(loss, count)])

    def saved(self):
        """For a checkpoint, with the sums of all ranks."""
        return dict(step=self.step, seconds=self.seconds, waited=self.waited,
                    sums=self.ranks.gather(self.sums.tolist()))

    def means(self):
        """Over all ranks: loss, hits in per cent, samples. Makes the hosts wait for the GPUs."""
        loss, hits, count = self.ranks.total(self.sums).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError("the training loss is not finite")
        some = max(count, 1)     # none, if a run is saved before its first step
        return loss / some, 100 * hits / some, int(count)


NOTHING, LATE, FAILED = -1, 0, 1000      # signals have numbers between the last two
SHARDED = "model", "optimizer"   # the parts that --fsdp divides among ranks


class Run:
    """One run in its folder: what it has done so far, and all that can end or continue it.

    config: all that decides the run, with model, optim, seed, epochs and data, a fingerprint.
    parts: {name in the checkpoint: what has state_dict and load_state_dict}. machine: names in
    config that may change between two sessions, since what is computed does not depend on them.
    All ranks call each method together. rows: those of log.csv, one for each finished epoch.
    """

    def __init__(self, folder, config, parts, args, ranks, stop, machine=()):
        """Make the folder, or restore what it holds: rows, and progress of an unfinished epoch."""
        self.folder, self.config, self.parts, self.machine = folder, config, parts, machine
        self.ranks, self.stop, self.minutes = ranks, stop, args.checkpoint_minutes
        self.rows, self.progress, self.lock, self.within_step = [], None, None, False
        there = ranks.gather((folder / "checkpoint.pt").exists())
        if len(set(there)) > 1:
            raise UsageError(f"{folder}/checkpoint.pt is there for some processes only: "
                             "--output_dir is to be in a place that all machines share")
        self.resumed = there[0]
        ranks.together(lambda: self.open(args))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began, self.due = time.monotonic(), time.monotonic() + 60 * self.minutes
        self.first = None                      # what was done when this session's first step began

    # ---------------------------------------------------------------- its beginning

    def open(self, args):
        first, extended = self.ranks.rank == 0, False
        if first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                check_folder(self.folder, args.resume)
                self.lock = lock(self.folder)
            except OSError as error:
                raise UsageError(f"{self.folder} cannot be made ({error.strerror}): name another "
                                 "one with --output_dir")
        if self.resumed:
            extended = self.load()
            print(f"resumed after epoch {len(self.rows)} of {self.config['epochs']}"
                  + (f" and {self.progress.step} steps" if self.progress else ""), flush=True)
        elif args.resume:
            print(f"--resume: no checkpoint in {self.folder}, so this run starts anew", flush=True)
        if first and (not self.resumed or extended):
            optimizer = self.parts["optimizer"]
            write_json(self.folder / "config.json", dict(
                self.config, device=str(self.ranks.device), ranks=self.ranks.world,
                torch=torch.__version__, command=args.command,
                optimizer=repr(optimizer).splitlines()))
        if first and self.rows:
            self.write_log()

    def load(self):
        """Put the folder's checkpoint into the parts; whether the run goes on for more epochs."""
        path, config = self.folder / "checkpoint.pt", self.config
        saved = read_checkpoint(path)
        old = saved["config"]
        differ = [name for name in {**old, **config}
                  if name not in self.machine and old.get(name) != config.get(name)]
        extended = old.get("epochs") != config["epochs"]
        if differ == ["data"]:
            raise UsageError(f"{path} was trained on other data: the names of files or classes, "
                             "labels or contents have changed since. Restore them to continue it, "
                             "or name another folder with --output_dir")
        if differ:
            names = ", ".join(f"--{name} (was {old.get(name)}, now {config.get(name)})"
                              for name in differ[:4])
            names += f" and {len(differ) - 4} more" if len(differ) > 4 else ""
            why = "" if differ != ["epochs"] else "; the schedule's rates depend on the number " \
                "of epochs, so the ones done would have been others"
            raise UsageError(f"{path} belongs to another configuration, {names}{why}: repeat its "
                             "own flags and data to continue it, or name another folder with "
                             "--output_dir")
        if len(saved["log"]) + bool(saved["partial"]) > config["epochs"]:
            raise UsageError(f"{path} has more than --epochs {config['epochs']} behind it already")
        sharded = SHARDED if config.get("fsdp") else ()
        try:
            for name, part in self.parts.items():
                if name not in sharded:
                    part.load_state_dict(saved[name])
            if sharded:
                set_whole_state(*map(self.parts.get, sharded), *map(saved.get, sharded))
            self.progress = saved["partial"] and Progress(self.ranks, saved["partial"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            raise UsageError(f"{path} does not fit this version of {config['model']} and "
                             f"{config['optim']} ({problem}); move it away to start this run anew")
        self.rows = saved["log"]
        if extended:
            print(f"{old['epochs']} epochs become {config['epochs']}: the schedule is the same, so "
                  "this is the run that was begun with so many", flush=True)
        return extended

    # ---------------------------------------------------------------- its epochs

    @contextlib.contextmanager
    def epoch(self, number):
        """Around the training and testing of an epoch, counted from 0: its Progress.

        What ends a run leaves a checkpoint from which nothing is lost; within a step, where a
        model is half changed, it leaves the last one.
        """
        self.progress = self.progress or Progress(self.ranks)
        self.stop.noting = True
        try:
            try:
                yield self.progress
            except (KeyboardInterrupt, DataError, UsageError, OSError) as error:
                # of an OSError (of the output, say) the other ranks do not know
                if self.within_step or isinstance(error, OSError) and self.ranks.world > 1:
                    raise
                where = f"in epoch {number + 1} after step {self.progress.step}"
                self.save_unfinished()
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(error.args[0], where)
                raise UsageError(f"{str(error).rstrip('.')}; the run is saved {where}, and "
                                 "--resume continues there")
        except FloatingPointError as error:
            raise Diverged(f"training diverged in epoch {number + 1} ({error}): try a smaller "
                           f"--lr, a longer --warmup or more --damping; {self.folder} keeps what "
                           "was before")
        finally:
            self.stop.noting = self.within_step = False

    def steps(self, batches, total, number, every=None):
        """Yield the batches of epoch `number` that are still to come, of `total` in all.

        Between two of them the ranks agree whether to go on: a signal to any of them, or an image
        that one cannot read, ends all after the same step; the first one's clock tells when to
        save. Every 50 steps the loss is read, which makes a host wait for its GPU; or every so
        many, and then a line is printed where there is no bar.
        """
        progress, batches, text = self.progress, iter(batches), self.text(number)
        self.first = self.done(total) if self.first is None else self.first
        bar = tqdm(desc=text, total=total, initial=progress.step, leave=False,
                   disable=self.ranks.rank > 0 or None, dynamic_ncols=True)
        before, start = progress.seconds, time.perf_counter()
        while progress.step < total:
            problem, waiting = None, time.perf_counter()
            try:
                batch = next(batches)
            except (DataError, OSError) as error:
                problem = str(error)
            progress.waited += time.perf_counter() - waiting
            self.pause(problem, bar, total)
            torch.manual_seed(seed_of(self.config["seed"], number, progress.step, self.ranks.rank))
            self.within_step = True
            yield batch
            self.within_step = False
            progress.step += 1
            bar.update()
            if progress.step % (every or 50) == 0 or progress.step == total:
                loss, _, count = progress.means()
                progress.seconds = before + time.perf_counter() - start
                said = f"loss {loss:.4f}, {self.left(total)} left"
                bar.set_postfix_str(said)
                if every and bar.disable and progress.step < total:
                    print(f"{text}  step {progress.step}/{total}  {said}, "
                          f"{count / progress.seconds:.0f} images/s, "
                          f"{progress.waited / progress.seconds:.0%} waiting", flush=True)
            progress.seconds = before + time.perf_counter() - start
        bar.close()
        if not all(p.isfinite().all() for p in self.parts["model"].parameters()):
            raise FloatingPointError("a weight is not finite")

    def pause(self, problem, bar, total):
        """Save if it is time, and end if a signal or a problem came to a rank."""
        clock = LATE if self.ranks.rank == 0 and time.monotonic() >= self.due else NOTHING
        news = self.ranks.highest(FAILED if problem else self.stop.number or clock)
        if news == FAILED:
            raise UsageError(next(filter(None, self.ranks.gather(problem))))
        if news > LATE:
            raise KeyboardInterrupt(news)
        if news == LATE:
            self.save_unfinished()
            if bar.disable:
                print(f"{self.text(len(self.rows))}  step {self.progress.step}/{total}  saved, "
                      f"{self.left(total)} left", flush=True)

    def add(self, text, **figures):
        """An epoch is over: a row of the log, a checkpoint, and a line of at most 80 columns."""
        self.stop.noting = True
        self.rows.append(dict(
            epoch=len(self.rows) + 1, **figures, seconds=round(self.progress.seconds, 3),
            peak_memory=round(peak_memory(self.ranks.device), 1)))
        self.progress = None
        self.save()
        if self.ranks.rank == 0:
            self.write_log()
        end = f"{self.left()} left" if len(self.rows) < self.config["epochs"] else \
            time_in_words(time.monotonic() - self.began)
        print(f"{self.text(len(self.rows) - 1)}  {text}  {end}", flush=True)
        self.stop.noting = False

    def text(self, number):
        return f"epoch {number + 1:3d}/{self.config['epochs']}"

    def done(self, total=1):
        """Epochs, of which the running one has so many steps."""
        return len(self.rows) + (self.progress.step / total if self.progress else 0)

    def left(self, total=1):
        """The time that is left of the whole run, in words."""
        done = self.done(total)
        if done == self.first:
            return "unknown time"
        rate = (time.monotonic() - self.began) / (done - self.first)
        return time_in_words(rate * (self.config["epochs"] - done))

    # ---------------------------------------------------------------- what is left of it

    def save(self):
        """Write the checkpoint, by the first rank; nobody goes on, or ends, before it is there.

        Parameters, statistics and what evaluation uses are the same on all ranks. The BatchNorm
        statistics of an unfinished epoch are not, but there DDP goes on with the first rank's in
        any case.
        """
        partial = self.progress and self.progress.saved()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if self.config.get("fsdp"):                # of which the first rank gathers the whole
            states |= zip(SHARDED, whole_state(*map(self.parts.get, SHARDED)))

        def write():
            if self.ranks.rank == 0:
                content = dict(config=self.config, epoch=len(self.rows), log=self.rows,
                               partial=partial)
                content |= states
                write_file(self.folder / "checkpoint.pt", lambda file: torch.save(content, file))
        self.stop.saving = True
        try:
            self.ranks.together(write)
        finally:
            self.stop.saving = False
        self.due = time.monotonic() + 60 * self.minutes

    def save_unfinished(self):
        self.progress.means()        # raises where the loss is not finite: the last save stays
        self.save()

    def write_log(self):
        lines = [",".join(self.rows[0])] + [
            ",".join(str(v) if isinstance(v, int) else f"{v:.9g}" for v in row.values())
            for row in self.rows]
        write_file(self.folder / "log.csv",
                   lambda file: file.write(("\n".join(lines) + "\n").encode()))

    def finish(self):
        """The record of a finished run, which is written to its folder; others may use that now."""
        config, state = self.config, self.parts["optimizer"].state
        record = dict(
            model=config["model"], optim=config["optim"], seed=config["seed"],
            device=str(self.ranks.device), processes=self.ranks.world, torch=torch.__version__,
            **self.rows[-1],
            seconds_per_epoch=statistics.mean(row["seconds"] for row in self.rows),
            state_bytes=sum(v.nbytes for values in state.values() for v in values.values()
                            if torch.is_tensor(v)), output_dir=str(self.folder))
        record["peak_memory"] = max(row["peak_memory"] for row in self.rows)
        if self.ranks.rank == 0:
            write_json(self.folder / "record.json", record)
        if self.lock is not None:
            self.lock.close()
        return record


def peak_memory(device):
    """MiB: of the GPU since the run began; without one, of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:          # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)     # in bytes on macOS, else KiB


def run_script(script, parse, work, smoke, argv):
    """Run work(args, stop), or smoke(stop), on this rank; the exit status.

    Only the first rank speaks, but for errors that the others cannot know of.
    """
    speaks, stop = is_first(), Stop()
    print_anything()
    try:
        with stop.listening(), warnings.catch_warnings(), \
                contextlib.nullcontext() if speaks else contextlib.redirect_stdout(io.StringIO()):
            if not speaks:
                warnings.simplefilter("ignore")
            args = parse(argv)
            if args.smoke:
                if "WORLD_SIZE" in os.environ:
                    raise UsageError("--smoke is for one process: start it without torchrun")
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    names = smoke(stop)
                print(f"smoke test passed: {' '.join(names)}, {time.perf_counter() - start:.0f} s")
            else:
                work(args, stop)
        return 0
    except KeyboardInterrupt as interrupt:
        number, *where = interrupt.args or (signal.SIGINT,)
        tell(f"\nstopped {where[0]}; the same command with --resume continues there" if where
             else "\nstopped")
        return 128 + number
    except (UsageError, Diverged) as error:            # of all ranks: the first one says it
        tell(f"{script}: {error}")
        if not speaks:           # torchrun ends all ranks when one ends, and the first is to speak
            time.sleep(5)
        return 1 if isinstance(error, Diverged) else 2
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else 2
    except RuntimeError as error:
        if "RANK" in os.environ and (isinstance(error, dist.DistError)
                                     or re.search("onnection|Timed out", str(error))):
            tell(f"{script}: this process lost the others of its run, most likely as one of them "
                 f"has ended: {str(error).splitlines()[0]}")
        elif "can't allocate memory" in str(error):
            print(f"{script}: {error}", file=sys.stderr, flush=True)
        else:
            raise
        return 1
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
