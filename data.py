"""Small images that live on the device: CIFAR, Fashion-MNIST, and shapes drawn by numpy.

    python data.py shapes                        # ten classes drawn by numpy, no download
    python data.py cifar10 --data_dir data       # download (or resume, or only verify)

    from data import load, batches
    data = load("cifar10", "data")
    for epoch in range(epochs):
        for x, y in batches(data.train_images.to(device), data.train_labels.to(device), 128,
                            train=True, seed=0, epoch=epoch, mean=data.mean, std=data.std):

A data set of this size lives on the device as uint8 (CIFAR-10: 0.2 GB), where cropping and
flipping a batch is one gather: no worker processes, no image library. ImageNet does not fit there:
images.py reads it, and text.py texts; read_image and load_text of these are here by name too.
Nothing is unpacked to disk.
"""
import argparse
import gzip
import io
import math
import pickle
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
import torch.nn.functional as F

from augment import normalize
from download import MIRRORS, DataError, expand, fetch_any, fingerprint, one_at_a_time, verify
from images import read_image
from text import load_text

__all__ = ["Data", "batches", "load", "load_text", "num_batches", "read_image"]

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

# ---------------------------------------------------------------- loading


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

    @property
    def fingerprint(self):
        """A checksum of what is trained and measured on."""
        return fingerprint(*(tensor.cpu().numpy() for tensor in self[:4]))


def load(name, data_dir="data", train_size=None):
    """Return a data set as `Data`, on the CPU.

    name: cifar10, cifar100, fashion_mnist or shapes. data_dir: where it lies, or where it is put
    if it has to be downloaded. train_size: keep only the first so many training images. Raises
    DataError with a message for the user.
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
            train, test, source = load_fashion(data_dir)
        else:
            train, test, source = load_cifar(name, data_dir)
    except OSError as error:
        what = error.filename or data_dir
        raise DataError(f"cannot use {what}: {error.strerror or error}. Put that right or give "
                        f"another folder with --data_dir.") from error
    if train_size is not None and train_size > len(train[1]):
        raise DataError(f"train_size is {train_size}, but {name} has only {len(train[1])} training "
                        "images.")
    train = [array[:train_size].copy() for array in train]  # so that the others can be freed
    tensors = [torch.from_numpy(array) for array in (*train, *test)]
    return Data(*tensors, *STATISTICS[name], source)


def load_cifar(name, data_dir):
    """(train, test, source): both splits as (images (N, 3, 32, 32) uint8, labels (N,) int64)."""
    found = find_release(name, data_dir)
    if found is None:
        hint = (f"Put {' or '.join(release.archive for release in RELEASES[name])} into {data_dir} "
                "by hand, or use --dataset shapes, which needs no download.")
        with one_at_a_time(data_dir):
            if not find_release(name, data_dir):  # else another process was faster
                fetch_any(MIRRORS[name], data_dir, f"{name} could not be downloaded.", hint)
        found = find_release(name, data_dir)
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


def find_release(name, data_dir):
    """(path, release) of the first form found in data_dir, folder before archive; or None."""
    for release in RELEASES[name]:
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


def load_fashion(data_dir):
    """(train, test, source): both splits as (images (N, 1, 28, 28) uint8, labels (N,) int64)."""
    # MNIST's files have the same names, so these have a folder of their own.
    folder = data_dir / "fashion-mnist"
    if data_dir.name == folder.name or all((data_dir / file).is_file() for file in FASHION):
        folder = data_dir
    if not all((folder / file).exists() for file in FASHION):
        hint = (f"Put {', '.join(FASHION)} into {folder} by hand, or use --dataset shapes, which "
                "needs no download.")
        with one_at_a_time(folder):
            for file in FASHION:
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


# ---------------------------------------------------------------- shapes, drawn by numpy

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


# ---------------------------------------------------------------- batches


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
            x = crop_and_flip(x, generator)
        x = normalize(x, mean, std)
        yield (cut_out(x, generator, cutout) if cutout else x), y


def crop_and_flip(images, generator, pad=4):
    """Pad with zeros, crop to the old size at random, and mirror every second image on average.

    images: (B, C, H, W) uint8 on any device, returned likewise. generator: one of the CPU.
    """
    n, channels, height, width = images.shape
    top = torch.randint(2 * pad + 1, (n, 1), generator=generator)
    left = torch.randint(2 * pad + 1, (n, 1), generator=generator)
    mirror = torch.randint(2, (n, 1), generator=generator)
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


# ---------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description="Download or verify a data set.")
    parser.add_argument("name", help=", ".join(STATISTICS))
    parser.add_argument("--data_dir", "--data-dir", default="data",
                        help="the folder that holds it or is to hold it (default: data)")
    args = parser.parse_args()
    try:
        data = load(args.name, args.data_dir)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # NAME.part stays: a download goes on from there
    shape = "x".join(map(str, data.train_images.shape[1:]))
    print(f"{args.name}: {len(data.train_images)} training and {len(data.test_images)} test images "
          f"of {shape}, {data.num_classes} classes; {data.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
