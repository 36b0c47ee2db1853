"""ImageNet, or any tree of class folders: decoding, batches in worker processes, packed arrays.

    python images.py pack imagenet packed        # class folders of images, as arrays

    train = open_images("imagenet", "train")
    loader = ImageLoader(train, train_transform("torchvision", 176), 256, seed=0, train=True,
                         workers=8)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:            # uint8; augment.Finish does the rest on a device
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import numpy as np
import torch
from tqdm import tqdm

from augment import eval_transform, is_timm, pillow, random_state
from download import DataError, completed, expand, fingerprint

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow's names for those, and no others
SPLITS = {"train": ("train", "training"),
          "val": ("val", "valid", "validation", "eval", "evaluation")}
BLOCK = 256  # repeated augmentation counts an epoch in blocks of so many images


def read_image(path):
    """The image in a file, of any mode, as a PIL image of mode RGB.

    Raises DataError with the file's name when it cannot be opened or decoded.
    """
    Image = pillow()
    try:
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        if image.mode[0] in "IF":
            image = Image.fromarray(eight_bits(np.asarray(image), path))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image of the formats {', '.join(FORMATS)}; remove or "
                        "replace it.") from error
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"there is not enough memory to decode {path}; use fewer --workers."
                        ) from error
    except Exception as error:  # damaged bytes fail in any way they like
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error
        raise DataError(f"{path} cannot be decoded ({error}); remove or replace it.") from error


def eight_bits(pixels, path):
    """Grey levels of 16 bits, which may come as 32, in 8; Pillow would make nearly all white."""
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(f"{path} holds {pixels.dtype.name} pixels, whose range no format fixes; "
                        "convert it to 8 bits a channel.")
    return (pixels / 257).round().astype(np.uint8)  # 65535 = 255 · 257


class Source:
    """One split of a data set, whose images are read one at a time.

    labels: (N,) int64 array. classes: their names. where: what to call it in a message.
    fingerprint: a checksum of names and labels. read(i): a PIL image of mode RGB, or an
    (H, W, 3) uint8 array, the same whenever and in whatever process it is asked for.
    """

    def __len__(self):
        return len(self.labels)


class FolderImages(Source):
    """Image files in class folders, listed once, decoded when they are asked for.

    folder/<class>/**/<file> with an extension of EXTENSIONS in either case; links are followed,
    hidden files are not looked at. A class's number is its folder's place in sorted order.
    classes: the training split's names, which these folders must have; None for that split.
    Raises DataError.
    """

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

    @property
    def fingerprint(self):
        """Of all names and labels, and the sizes of some files: a million would take minutes."""
        some = map(self.path, range(0, len(self), math.ceil(len(self) / 256)))
        sizes = [os.path.getsize(path) for path in some if os.path.exists(path)]
        return fingerprint("\n".join(self.classes), self.names, self.labels, np.array(sizes))

    def path(self, i):
        return os.path.join(self.folder, self.classes[self.labels[i]], os.fsdecode(self.names[i]))

    def read(self, i):
        return read_image(self.path(i))


def list_files(folder):
    """Paths, relative to a class folder, of the image files below it, sorted, as bytes."""
    found, seen, places = [], set(), [""]
    while places:
        below = places.pop()
        place = os.path.join(folder, below)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            name = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                places.append(name)
            # A pipe or a device is no file; a link to nothing is one, and is reported when read.
            elif entry.name.lower().endswith(EXTENSIONS) and (
                    entry.is_file() or not os.path.exists(entry.path)):
                found.append(os.fsencode(name))
    return sorted(found)


def check_classes(found, wanted, where):
    """Raise DataError unless the class names are several, and those of the training split."""
    if wanted is None and len(found) == 1:
        raise DataError(f"{where} holds '{found[0]}' alone, and there is nothing to tell from one "
                        "class; is it the folder above that of the classes?")
    if wanted is not None and list(found) != list(wanted):
        extra, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
        raise DataError(f"{where} must have the same classes as the training images, but lacks "
                        f"{quoted(missing)} and has {quoted(extra)} that training has not.")


def quoted(names, most=3):
    """A few names in a row, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more or "none"


class PackedImages(Source):
    """One split of a folder that `python images.py pack` wrote; read without Pillow.

    SPLIT.images.npy (N, S, S, 3) uint8, SPLIT.labels.npy (N,) int64, SPLIT.packed.json
    with the rest, which is written last: a split without it is unfinished. Raises DataError.
    """

    def __init__(self, folder, split, classes=None):
        self.file = os.path.join(folder, f"{split}.images.npy")
        self.where = f"{self.file} (packed)"
        try:
            with open(os.path.join(folder, f"{split}.packed.json"), encoding="utf-8") as file:
                self.about = about = json.load(file)
            self.labels = np.load(os.path.join(folder, f"{split}.labels.npy"))
            self.classes, shape = list(about["classes"]), (about["count"], *[about["size"]] * 2, 3)
            images = np.load(self.file, mmap_mode="r")
            if images.shape != shape or images.dtype != np.uint8 \
                    or self.labels.shape != shape[:1] or self.labels.dtype != np.int64 \
                    or self.labels.min() < 0 or self.labels.max() >= len(self.classes):
                raise ValueError("its files do not belong together")
        except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(f"the packing of {split} in {folder} is incomplete or damaged "
                            f"({error}); remove it and run `python images.py pack` again."
                            ) from error
        check_classes(self.classes, classes, self.file)
        self.images = images
        self.fingerprint = fingerprint(json.dumps(about), self.labels)

    def __getstate__(self):  # a worker maps the file for itself: pickling would send its content
        return {**self.__dict__, "images": None}

    def read(self, i):  # from the disk, as it is used
        if self.images is None:
            self.images = np.load(self.file, mmap_mode="r")
        return np.asarray(self.images[i])


class DummyImages(Source):
    """Random images (size, size, 3) uint8 with random labels, for trying things without data."""

    def __init__(self, count, size, num_classes, seed=0):
        self.size, self.seed = size, seed
        self.where = f"random images, seed {seed}"
        self.classes = [str(i) for i in range(num_classes)]
        self.labels = random_state(seed, 0).integers(num_classes, size=count)
        self.fingerprint = fingerprint(f"{count} {size} {num_classes} {seed}")

    def read(self, i):
        shape = (self.size, self.size, 3)
        return np.frombuffer(random_state(self.seed, 1, i).bytes(math.prod(shape)),
                             np.uint8).reshape(shape)


class FewerImages(Source):
    """`count` images of another source, evenly spaced, so that sorted classes keep their shares.

    Raises DataError if there are not as many.
    """

    def __init__(self, source, count):
        if count > len(source):
            raise DataError(f"train_size is {count}, but {source.where} has only {len(source)} "
                            "training images.")
        self.source, self.indices = source, np.arange(count) * len(source) // count
        self.labels, self.classes = source.labels[self.indices], source.classes
        self.where = f"of the {len(source)} in {source.where}"
        self.fingerprint = fingerprint(f"{count} {source.fingerprint}")

    def read(self, i):
        return self.source.read(self.indices[i])


def open_images(root, split, classes=None):
    """The Source of one split of a data set.

    root: a folder with split/<class>/<image file>, or one that `python images.py pack` wrote. For
    val, `valid`, `validation`, `eval` and `evaluation` do as well, for train `training`.
    classes: the training split's list, when another split is opened, which must have the same.
    Raises DataError.
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
        raise DataError(f"{root} has no folder '{split}'; expected {root}/{split}/<class>/<image "
                        "file>, or what `python images.py pack` wrote if it was not interrupted.")
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror or error}."
                        ) from error


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

    source: from open_images, or DummyImages. transform: from train_transform or eval_transform.
    train: shuffle; else every world-th image from `rank` on, in order, none twice and none left
    out, perhaps none at all. repeats: how often an image is taken (repeated augmentation), when
    there are several ranks; one alone would see the copies in one batch, and shuffles plainly.
    recipe: "torchvision" keeps a last incomplete batch of training, "timm" drops what
    does not fill a step of accum batches from each rank.
    workers: processes that read and transform; 0 does it in this one.

    The random numbers of a sample come from (seed, epoch, position), so the batches do not depend
    on the number of workers, nor on where in an epoch a run was resumed. Raises DataError, also
    for what goes wrong in a worker.
    """

    def __init__(self, source, transform, batch_size, *, seed, train, rank=0, world=1, repeats=1,
                 accum=1, recipe="torchvision", workers=0, pin_memory=False):
        self.count, self.batch_size, self.seed, self.train = len(source), batch_size, seed, train
        self.rank, self.world, self.repeats = rank, world, repeats if world > 1 else 1
        self.accum, self.drop_last = accum, is_timm(recipe) and train
        if train and self.repeats > 1 and self.count < BLOCK:
            raise DataError(f"repeated augmentation takes images in blocks of {BLOCK}, but "
                            f"{source.where} has only {self.count}; switch it off or add images.")
        self.plan = []  # the batches of this epoch that are still to come
        self.set_epoch(0)
        if train and len(self) == 0:
            raise DataError(f"{self.count} images ({source.where}) are less than the "
                            f"{batch_size * world * accum} of a step; use smaller batches.")
        # Forked workers start at once and share the list of files; Python 3.14 would have an
        # intermediate process start them, which a SIGTERM ends. They end with their epoch, so that
        # those of a test loader come in place of these. torch's own generator is left alone: it
        # belongs to the network.
        fork = workers > 0 and sys.platform == "linux"
        self.loader = torch.utils.data.DataLoader(
            Samples(source, transform, seed), batch_size=None, sampler=self.plan,
            num_workers=workers, pin_memory=pin_memory,
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
        self.batches = math.ceil(len(indices) / size)
        if self.drop_last:       # as many steps of as many images, however they are divided
            whole = min(self.count, len(indices) * self.world)
            self.batches = whole // (size * self.world * self.accum) * self.accum
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
        if os.path.samefile(src, dst):         # whose images would not be found beside the arrays
            raise DataError(f"{dst} holds the images themselves; name another folder for the "
                            "arrays.")
        for split, source in sources.items():
            if not isinstance(source, FolderImages):
                raise DataError(f"{src} is packed already; give a folder with train/<class>/ and "
                                "val/<class>/.")
            about = {"count": len(source), "size": size, "from": source.folder,
                     "files": source.fingerprint, "classes": source.classes}
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
    if not os.path.exists(os.path.join(dst, f"{split}.packed.json")):
        return False
    there = PackedImages(dst, split)
    if there.about != about:
        raise DataError(f"{dst} holds another packing of {split}: {len(there)} images of "
                        f"{there.about['size']} pixels from {there.about.get('from')}; remove it, "
                        "or choose another folder.")
    print(f"{there.file}: complete already, left as it is")
    return True


def write_packed(dst, split, source, about, workers):
    """Write one split; returns a line that says what."""
    size = about["size"]
    transform = eval_transform(size, size, "bicubic")
    loader = ImageLoader(source, transform, 64, seed=0, train=False, workers=workers)
    place = os.path.join(dst, f"{split}.images.npy")
    with completed(place) as file, tqdm(
            desc=f"packing {split}", total=len(source), unit=" images", disable=None) as bar:
        np.lib.format.write_array_header_1_0(file, {
            "descr": "|u1", "fortran_order": False, "shape": (len(source), size, size, 3)})
        for images, _ in loader:
            file.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)
            bar.update(len(images))
    with completed(os.path.join(dst, f"{split}.labels.npy")) as file:
        np.save(file, source.labels)
    with completed(os.path.join(dst, f"{split}.packed.json")) as file:
        file.write(json.dumps(about).encode())
    return (f"{place}: {len(source)} images of {size}x{size}, {len(source.classes)} classes, "
            f"{os.path.getsize(place) / 1e6:.1f} MB")


# ---------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description="Prepare class folders of images.")
    parser.add_argument("command", choices=["pack"], help="write them as uint8 arrays, which are "
                        "read without decoding and without Pillow")
    parser.add_argument("src", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("dst", help="folder for the arrays; give it to train_imagenet.py")
    parser.add_argument("--size", type=int, default=256,
                        help="pixels of a side: the short side is scaled to it and the centre "
                        "kept (default: 256; a million images need 197 GB)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes that decode (default: the machine's cores)")
    args = parser.parse_args()
    try:
        if args.size < 1 or args.workers < 0:
            raise DataError("--size must be at least 1 and --workers at least 0.")
        pack(args.src, args.dst, args.size, args.workers)
    except DataError as error:
        print(f"images.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the packing begins anew
    return 0


if __name__ == "__main__":
    sys.exit(main())
