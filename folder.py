"""A run's folder: files written whole or not at all, what is in it already, and who owns it."""
import json
import math
import zipfile
from pathlib import Path

import torch

from download import completed
from ranks import UsageError


def write_file(path, write):
    """All of it or nothing: whoever kills this process finds the old file or the new one."""
    try:
        with completed(path) as file:
            write(file)
    except BaseException as error:
        while error is not None and not isinstance(error, OSError):
            error = error.__context__          # torch.save hides what the disk said
        if error is None:
            raise
        raise UsageError(f"{path} cannot be written ({error.strerror}); what was there before is "
                         "left as it was")


def finite(content):
    """The same, with None for what is infinite or no number: JSON has no words for these."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content if not isinstance(content, float) or math.isfinite(content) else None


def write_json(path, content):
    text = json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n"
    # of the surrogates, which stand for bytes of a path that are no UTF-8, this makes JSON's \udce9
    write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def read_checkpoint(path):
    try:
        damaged = zipfile.ZipFile(path).testzip()      # checks what torch.load does not: the CRCs
        if damaged:
            raise zipfile.BadZipFile(damaged)
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        return saved | dict(config=dict(saved["config"]), log=list(map(dict, saved["log"])),
                            partial=saved["partial"] and dict(saved["partial"]))
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read, it is damaged or not a checkpoint of this script "
                         f"({type(error).__name__}); move it away to start this run anew")


def check_folder(folder, resume):
    """Refuse a run's folder that cannot be made, or holds a run that is not to be continued."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    if not place.is_dir():
        raise UsageError(f"{folder} cannot be the run's folder, since {place} is a file: name "
                         "another one with --output_dir")
    if (folder / ".lock").exists():
        lock(folder, alone=False).close()
    files = [folder / name for name in ("config.json", "log.csv", "checkpoint.pt")]
    if any(file.exists() for file in files) and not resume:
        raise UsageError(f"{folder} already holds a run: add --resume to continue it, or name "
                         "another folder with --output_dir")


def run_folders(args, name):
    """{(optimizer, seed): folder}, of what --output_dir or a name says."""
    folders = {}
    for optim in args.optim:
        for seed in args.seed:
            folder = Path("runs", f"{name}-{args.model}-{optim}", str(seed))
            if args.output_dir is not None:
                folder = Path(args.output_dir, optim if len(args.optim) > 1 else "",
                              str(seed) if len(args.seed) > 1 else "")
            check_folder(folder, args.resume)
            folders[optim, seed] = folder
    return folders


def lock(folder, alone=True):
    """Own a run's folder as long as the returned file is open and this process lives.

    A lock of this kind (POSIX) is not inherited by workers, which may outlive a killed process.
    alone=False shares it with others that look whether the folder is owned, as all ranks do.
    """
    try:
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise UsageError(f"{folder}/.lock cannot be opened ({error.strerror}): name another folder "
                         "with --output_dir")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(f"{folder} is in use by another process that is running there: wait for "
                         "its end, or name another folder with --output_dir")
    except (ImportError, OSError):             # Windows; a file system without locks
        pass
    return file
