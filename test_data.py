"""data.py: every form of CIFAR and Fashion-MNIST, damage, shapes, and batches; no real data set."""
import gzip
import hashlib
import io
import os
import pickle
import runpy
import struct
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import download
from test_download import md5, mirror, put, refused  # noqa: F401


def tiny_images(seed, count):
    """Images (count, 3, 32, 32) uint8 and labels (count,) below ten."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, 10, count)


def as_binary(images, labels):
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels))


def as_python(images, labels):
    """The bytes that Python 2 wrote: str for keys and pixels, numpy.core for the array."""
    def text(raw):
        return b"T" + struct.pack("<i", len(raw)) + raw
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
             + struct.pack("<H", len(images))
             + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
             b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
             + text(images.tobytes()) + b"tb")
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def tar_gz(files):
    """The bytes of a gzipped tar archive of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


# A CIFAR-10 of 2 x 4 training and 3 test images: the files of both forms, and their archives.
TINY = [tiny_images(seed, count) for seed, count in ((0, 4), (1, 4), (2, 3))]
BIN = {name: as_binary(*part) for name, part in zip("abc", TINY)}
PY = {name: as_python(*part) for name, part in zip("xyz", TINY)}
ARCHIVES = {f"tiny.{form}.gz": tar_gz({f"{form}/{name}": blob for name, blob in files.items()})
            for form, files in (("bin", BIN), ("py", PY))}
IMAGES = TINY[0][0]


@pytest.fixture(autouse=True)
def cifar10_is_tiny(monkeypatch):
    for name, blob in ARCHIVES.items():
        monkeypatch.setitem(download.FILES, name, (len(blob), md5(blob)))
    monkeypatch.setitem(download.MIRRORS, "cifar10", ())
    monkeypatch.setitem(data.RELEASES, "cifar10", (
        data.Release("tiny.bin.gz", "bin", 1, {"a": 4, "b": 4}, {"c": 3}),
        data.Release("tiny.py.gz", "py", b"labels", {"x": 4, "y": 4}, {"z": 3})))


def is_tiny(loaded, train=8):
    want = [*(np.concatenate(arrays)[:train] for arrays in zip(*TINY[:2])), *TINY[2]]
    for got, array in zip(loaded[:4], want):
        assert torch.equal(got, torch.from_numpy(array)) and got.dtype in (torch.uint8, torch.int64)
    return True


# ---------------------------------------------------------------- shapes and batches

def test_shapes():
    """The same bytes everywhere, balanced classes, the first N the same whatever N is."""
    images, labels = data.draw_shapes(0, 0)
    assert hashlib.md5(images.tobytes() + labels.tobytes()).hexdigest() == (
        "0b406e22091aed33c15bcd0c647eb88f"), "shapes are not those that the results were run on"
    small, large = data.load("shapes", train_size=37), data.load("shapes", train_size=620)
    assert torch.equal(small.train_images, large.train_images[:37])
    assert torch.equal(small.test_images, large.test_images) and len(large.test_images) == 2000
    assert torch.equal(torch.bincount(large.train_labels), torch.full((10,), 62))
    pixels = large.test_images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(large.mean, rel=2e-2)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(large.std, rel=2e-2)
    for size in (0, -5):
        with refused("train_size", size):
            data.load("shapes", train_size=size)


FORTY = torch.from_numpy(tiny_images(3, 40)[0])[:, :, :, :28]      # (40, 3, 32, 28)


def test_crop_and_flip():
    """Against a loop over the images."""
    state = torch.Generator().manual_seed(5)
    got = data.crop_and_flip(FORTY, torch.Generator().manual_seed(5), pad=3)
    top, left, mirrored = (torch.randint(n, (40, 1), generator=state) for n in (7, 7, 2))
    for i in range(40):
        want = F.pad(FORTY[i], (3, 3, 3, 3))[:, top[i]:top[i] + 32, left[i]:left[i] + 28]
        assert torch.equal(got[i], want.flip(2) if mirrored[i] else want)
    assert {0, 6} <= set(top.flatten().tolist()) and 5 < mirrored.sum() < 35


def test_cut_out():
    state = torch.Generator().manual_seed(6)
    got = data.cut_out(FORTY + 1.0, torch.Generator().manual_seed(6), 8)
    y, x = torch.randint(32, (40,), generator=state), torch.randint(28, (40,), generator=state)
    for i in range(40):
        want = FORTY[i] + 1.0
        want[:, max(y[i] - 4, 0):y[i] + 4, max(x[i] - 4, 0):x[i] + 4] = 0
        assert torch.equal(got[i], want)


def numbered_batches(size=16, train=True, count=50, **how):
    """Batches of images that are filled with their number plus 1."""
    images = torch.arange(1, 51, dtype=torch.uint8)[:, None, None, None].expand(50, 1, 8, 8)
    how = {"crop": False, "seed": 1, "epoch": 2, **how} if train else how
    return list(data.batches(images[:count], torch.arange(count), size, train=train, mean=(0.0,),
                             std=(1 / 255,), **how))


def test_batches():
    """An epoch depends on (seed, epoch) only; training drops a short batch, evaluation none."""
    before = torch.random.get_rng_state()
    first = numbered_batches()
    for how in ({"epoch": 3}, {"seed": 2}, {"epoch": 1, "seed": 2}):
        assert not torch.equal(first[0][1], numbered_batches(**how)[0][1])
    for x, y in first:
        assert torch.equal(x.round(), (y + 1.0)[:, None, None, None].expand_as(x))
    assert len(torch.cat([y for _, y in first]).unique()) == 48
    evaluation = numbered_batches(train=False)
    assert torch.equal(torch.cat([y for _, y in evaluation]), torch.arange(50))
    for how, most in (({"crop": True}, 48), ({"cutout": 4}, 16)):
        once, again = (torch.cat([x for x, _ in numbered_batches(**how)]) for _ in range(2))
        assert torch.equal(once, again) and (once == 0).sum((1, 2, 3)).max() == most
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are drawn


@pytest.mark.parametrize("count, size, train, want", [
    (50, 16, True, [16] * 3), (48, 16, True, [16] * 3), (16, 16, True, [16]), (10, 16, True, [10]),
    (50, 16, False, [16] * 3 + [2]), (48, 16, False, [16] * 3), (10, 16, False, [10])])
def test_sizes_of_batches(count, size, train, want):
    assert [len(y) for _, y in numbered_batches(size, train, count)] == want
    assert data.num_batches(count, size, train) == len(want)


# ---------------------------------------------------------------- CIFAR

@pytest.mark.parametrize("form, files", [("bin", BIN), ("py", PY)])
def test_cifar_forms(tmp_path, form, files):
    """Unpacked folder or archive, in data_dir or being it: the same images."""
    def check(place, named, **how):
        loaded = data.load("cifar10", place, **how)
        assert is_tiny(loaded, *how.values()) and str(named) in loaded.source
        return loaded.fingerprint
    name = f"tiny.{form}.gz"
    archive = put(tmp_path / "archive", **{name: ARCHIVES[name]})
    whole = check(archive, archive / name)
    folder = put(tmp_path / form, **files)
    assert whole == check(tmp_path, folder) == check(folder, folder)
    place = folder.rename(tmp_path / "renamed")
    assert whole == check(str(place), place) != check(place, place, train_size=5)
    put(place / "bin", **BIN)                                   # the binary form comes first
    check(place, place if form == "bin" else place / "bin")


def test_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path, file=b"mine")
    put(tmp_path / "bin", **BIN)
    for words, name, place, how in (
            (["train_size is 9", "8"], "cifar10", tmp_path, {"train_size": 9}),
            (["mnist", "cifar10", "shapes"], "mnist", tmp_path, {}),
            ([tmp_path / "file", "--data_dir"], "cifar10", "~/file", {}),
            ([tmp_path / "file", "--data_dir"], "cifar10", tmp_path / "file" / "below", {}),
            (["~who?/x", "in full"], "cifar10", "~who?/x", {})):
        with refused(*words) as caught:
            data.load(name, place, **how)
        assert "Mirrors" not in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("archive", ARCHIVES)
def test_download(mirror, tmp_path, archive):  # noqa: F811
    """Fetched once, verified, and found again."""
    mirror.blobs.update(ARCHIVES)
    addresses = [f"{mirror.address}/{how}/{archive}" for how in ("missing", "good")]
    download.MIRRORS["cifar10"] = addresses[:1]
    with refused("cifar10 could not be downloaded", "404", "tiny.bin.gz or tiny.py.gz", "by hand",
                 "--dataset shapes"):
        data.load("cifar10", tmp_path)
    download.MIRRORS["cifar10"] = addresses
    for _ in range(2):
        assert is_tiny(data.load("cifar10", tmp_path))
    assert [how for how, _ in mirror.requests] == ["missing", "missing", "good"]


def pickled(images, labels, protocol=4):
    return pickle.dumps({b"data": images.reshape(4, 3072), b"labels": labels}, protocol)


@pytest.mark.parametrize("file, content, words", [
    ("tiny.bin.gz", b"", "0 bytes"), ("tiny.bin.gz", ARCHIVES["tiny.bin.gz"][:-9], "Remove it"),
    ("tiny.bin.gz", bytes(len(ARCHIVES["tiny.bin.gz"])), "md5"),
    ("a", BIN["a"][:-1], f"{4 * 3073 - 1} bytes"),
    ("a", b"\x0a" + BIN["a"][1:], "label 10 is not one of 0 to 9"),
    ("x", PY["x"][:200], "damaged"), ("x", b"", "damaged"), ("x", pickle.dumps([1, 2]), "damaged"),
    ("x", PY["x"].replace(b"labels", b"fables"), "damaged"),
    ("x", as_python(IMAGES[:3], [0, 1, 2]), "does not hold 4 images"),
    ("x", as_python(IMAGES, [0, 1, 2]), "does not hold 4 images"),
    ("x", pickled(IMAGES.astype(np.uint16), [0] * 4), "does not hold 4 images"),
    ("x", pickled(IMAGES, [0.5] * 4), "does not hold 4 images")])
def test_damaged_files(tmp_path, file, content, words):
    """A damaged file is named, with what to do, and is left as it was."""
    put(tmp_path, **{"a": BIN, "x": PY}.get(file, {}) | {file: content})
    with refused(tmp_path, file, words) as caught:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value) and (tmp_path / file).read_bytes() == content


def test_missing_files(tmp_path):
    put(tmp_path / "bin", a=BIN["a"], b=BIN["b"])
    with refused(tmp_path / "bin", "lacks c"):
        data.load("cifar10", tmp_path)
    short = tar_gz({"bin/a": BIN["a"], "../bin/b": BIN["b"]})
    download.FILES["tiny.bin.gz"] = (len(short), md5(short))
    with refused("does not contain bin/b"):
        data.load("cifar10", put(tmp_path / "archive", **{"tiny.bin.gz": short}))


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_of_today(protocol):
    """What numpy of today writes: two ways to the same array."""
    images, labels = data.parse_pickle(pickled(IMAGES, [1, 2, 3, 4], protocol), "x", b"labels", 4)
    assert (images == IMAGES.reshape(4, 3072)).all() and labels.tolist() == [1, 2, 3, 4]


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


MARK = "mark"       # what a hostile file would write


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [
    (os.system, (f"touch {MARK}",)), (exec, (f"open('{MARK}', 'w')",)), (np.load, (MARK,)),
    (getattr, ("", "join")), (np.ndarray.tofile, (np.ones(3), MARK))])
def test_hostile_pickle(tmp_path, monkeypatch, call, protocol):
    """Only what an array needs is called; everything else is refused before it runs."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "py", **PY | {"x": pickled(IMAGES, [Evil(*call)] * 4, protocol)})
    with refused(tmp_path / "py", "it asks for", "x in"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / MARK).exists()


def test_fingerprint():
    """Another where an image or a label differs."""
    tensors = [torch.zeros(2, dtype=torch.uint8) for _ in range(4)]
    prints = [data.Data(*tensors, 10, (), (), source).fingerprint for source in "ab"]
    for tensor in tensors:
        tensor[1] += 1
        prints.append(data.Data(*tensors, 10, (), (), "").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 5


# ---------------------------------------------------------------- Fashion-MNIST, command line

def test_fashion(mirror, monkeypatch, tmp_path):  # noqa: F811
    """Four idx files, found or downloaded, verified, and of the right layout."""
    def idx(array):
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        return gzip.compress(header + array.astype(np.uint8).tobytes(), 1)

    def publish(blobs):
        mirror.blobs.update(blobs)
        for name, blob in blobs.items():
            monkeypatch.setitem(download.FILES, name, (None, md5(blob)))
    images, labels = np.arange(5 * 784).reshape(5, 28, 28) % 251, np.arange(5) + 4
    blobs = dict(zip(data.FASHION, map(idx, (images, labels, images[:3], labels[:3]))))
    publish(blobs)
    addresses = [f"{mirror.address}/{how}/" for how in ("missing", "good")]
    monkeypatch.setitem(download.MIRRORS, "fashion_mnist", addresses[:1])
    with refused("could not be downloaded", *data.FASHION):
        data.load("fashion_mnist", tmp_path)
    download.MIRRORS["fashion_mnist"] = addresses
    put(tmp_path / "fashion-mnist", **{data.FASHION[0]: blobs[data.FASHION[0]]})
    for place in (tmp_path, tmp_path / "fashion-mnist"):
        got = data.load("fashion_mnist", place)
        assert torch.equal(got.train_images, torch.from_numpy(images.astype(np.uint8))[:, None])
        assert got.test_labels.tolist() == [4, 5, 6] and got.test_images.shape == (3, 1, 28, 28)
    assert len(mirror.requests) == 1 + 6                        # for the three that were missing
    file = data.FASHION[1]
    for content, words in ((idx(labels[:3]), "does not fit"), (idx(images), "not an idx file of 1"),
                           (idx(labels + 2), "label 10 is not one of 0 to 9")):
        put(place, **{file: content})
        with refused(place / file, "Remove it"):
            data.load("fashion_mnist", tmp_path)
        publish({file: content})
        with refused(file, words):
            data.load("fashion_mnist", tmp_path)


@pytest.mark.parametrize("name, status, words", [
    ("imagenet", 2, "data.py: no data set is called 'imagenet'"),
    ("shapes", 0, "shapes: 10000 training and 2000 test images of 3x32x32, 10 classes; drawn")])
def test_command_line(monkeypatch, capsys, name, status, words):
    monkeypatch.setattr("sys.argv", ["data.py", name])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(data.__file__, run_name="__main__")
    assert stop.value.code == status
    line = capsys.readouterr()[0 if status == 0 else 1]
    assert line.startswith(words) and line.count("\n") == 1
