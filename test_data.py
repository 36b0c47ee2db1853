"""data.py: every form of CIFAR and Fashion-MNIST, damage, shapes, and batches; no real data set."""
import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

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


TINY = [tiny_images(seed, count) for seed, count in ((0, 4), (1, 4), (2, 3))]


@pytest.fixture
def blobs(monkeypatch):
    """A CIFAR-10 of 2 x 4 training and 3 test images: {name: bytes} of both archives' files."""
    binary = {f"bin/{name}": as_binary(*part) for name, part in zip("abc", TINY)}
    python = {f"py/{name}": as_python(*part) for name, part in zip("xyz", TINY)}
    archives = {"tiny.bin.gz": tar_gz(binary), "tiny.py.gz": tar_gz(python)}
    for name, blob in archives.items():
        monkeypatch.setitem(download.FILES, name, (len(blob), md5(blob)))
    monkeypatch.setitem(download.MIRRORS, "cifar10", ())
    monkeypatch.setitem(data.RELEASES, "cifar10", (
        data.Release("tiny.bin.gz", "bin", 1, {"a": 4, "b": 4}, {"c": 3}),
        data.Release("tiny.py.gz", "py", b"labels", {"x": 4, "y": 4}, {"z": 3})))
    return {**archives, **binary, **python}


def is_tiny(loaded, train=8):
    images, labels = (np.concatenate(arrays)[:train] for arrays in zip(*TINY[:2]))
    assert torch.equal(loaded.train_images, torch.from_numpy(images))
    assert torch.equal(loaded.train_labels, torch.from_numpy(labels))
    assert torch.equal(loaded.test_images, torch.from_numpy(TINY[2][0]))
    assert loaded.train_images.dtype == torch.uint8 and loaded.train_labels.dtype == torch.int64
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
    assert small.train_images.shape == (37, 3, 32, 32) and small.train_images.dtype == torch.uint8
    pixels = large.test_images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(large.mean, rel=2e-2)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(large.std, rel=2e-2)
    for size in (0, -5):
        with refused("train_size", size):
            data.load("shapes", train_size=size)


def test_crop_and_flip():
    """Against a loop over the images."""
    images = torch.from_numpy(tiny_images(3, 40)[0])[:, :, :, :28]  # (40, 3, 32, 28)
    state = torch.Generator().manual_seed(5)
    got = data.crop_and_flip(images, torch.Generator().manual_seed(5), pad=3)
    top, left, mirrored = (torch.randint(n, (40, 1), generator=state) for n in (7, 7, 2))
    for i in range(40):
        want = F.pad(images[i], (3, 3, 3, 3))[:, top[i]:top[i] + 32, left[i]:left[i] + 28]
        assert torch.equal(got[i], want.flip(2) if mirrored[i] else want)
    assert {0, 6} <= set(top.flatten().tolist()) and 5 < mirrored.sum() < 35


def test_cut_out():
    x = torch.from_numpy(tiny_images(3, 40)[0])[:, :, :, :28] + 1.0
    state = torch.Generator().manual_seed(6)
    got = data.cut_out(x, torch.Generator().manual_seed(6), 8)
    y, z = torch.randint(32, (40,), generator=state), torch.randint(28, (40,), generator=state)
    for i in range(40):
        want = x[i].clone()
        want[:, max(y[i] - 4, 0):y[i] + 4, max(z[i] - 4, 0):z[i] + 4] = 0
        assert torch.equal(got[i], want)


def numbered_batches(size=16, train=True, count=50, **how):
    """Batches of images that are filled with their number."""
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 1, 8, 8)
    how = {"crop": False, "seed": 1, "epoch": 2, **how} if train else how
    return list(data.batches(images[:count], torch.arange(count), size, train=train, mean=(0.0,),
                             std=(1 / 255,), **how))


def test_batches():
    """An epoch depends on (seed, epoch) only; training drops a short batch, evaluation none."""
    for kind in ({"crop": True, "cutout": 4}, {}):
        for (x, y), (u, v) in zip(numbered_batches(**kind), numbered_batches(**kind)):
            assert torch.equal(x, u) and torch.equal(y, v)
    before = torch.random.get_rng_state()
    first = numbered_batches()
    for other in ({"epoch": 3}, {"seed": 2}, {"epoch": 1, "seed": 2}):
        assert not torch.equal(first[0][1], numbered_batches(**other)[0][1])
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are drawn
    for x, y in first:
        assert torch.equal(x[:, 0, 0, 0].round().long(), y), "image and label belong together"
    assert [len(y) for _, y in first] == [16, 16, 16]
    assert len(torch.cat([y for _, y in first]).unique()) == 48
    assert [len(y) for _, y in numbered_batches(count=10)] == [10]  # all there is
    evaluation = numbered_batches(train=False)
    assert torch.equal(torch.cat([y for _, y in evaluation]), torch.arange(50))


@pytest.mark.parametrize("count, size", [(50, 16), (48, 16), (16, 16), (10, 16), (1, 1)])
@pytest.mark.parametrize("train", [True, False])
def test_number_of_batches(count, size, train):
    assert len(numbered_batches(size, train, count)) == data.num_batches(count, size, train)


# ---------------------------------------------------------------- CIFAR

def test_cifar_forms(blobs, tmp_path):
    """Unpacked folder or archive, binary or Python, in data_dir or being it: the same images."""
    def load(folder, **how):
        return data.load("cifar10", folder, download=False, **how)
    for archive in ("tiny.bin.gz", "tiny.py.gz"):
        place = put(tmp_path / f"only_{archive}", **{archive: blobs[archive]})
        assert is_tiny(load(place)) and archive in load(place).source
    binary = put(tmp_path / "all" / "bin", **{n: blobs[f"bin/{n}"] for n in "abc"})
    python = put(tmp_path / "all" / "py", **{n: blobs[f"py/{n}"] for n in "xyz"})
    assert is_tiny(load(tmp_path / "all")) and "bin" in load(tmp_path / "all").source
    python.rename(tmp_path / "renamed")
    for place in (binary, str(tmp_path / "renamed")):
        assert is_tiny(load(place)) and str(place) in load(place).source
    assert is_tiny(load(binary, train_size=5), 5)
    with refused("train_size is 9", "8"):
        load(binary, train_size=9)
    with refused("nowhere", "tiny.bin.gz", "--dataset shapes"):
        load(tmp_path / "nowhere")
    with refused("mnist", "cifar10", "shapes"):
        data.load("mnist")


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_of_today(protocol):
    """What numpy of today writes: two ways to the same array."""
    content = {b"data": TINY[0][0].reshape(4, 3072), b"labels": [1, 2, 3, 4]}
    images, labels = data.parse_pickle(pickle.dumps(content, protocol), "x", b"labels", 4)
    assert (images == content[b"data"]).all() and labels.tolist() == [1, 2, 3, 4]


def test_download(blobs, mirror, tmp_path):  # noqa: F811
    """Fetched once, verified, and found again; a folder that cannot be written to says so."""
    mirror.blobs.update(blobs)
    for archive in ("tiny.bin.gz", "tiny.py.gz"):
        download.MIRRORS["cifar10"] = [f"{mirror.address}/{how}/{archive}"
                                       for how in ("missing", "good")]
        for _ in range(2):
            assert is_tiny(data.load("cifar10", tmp_path / f"for-{archive}"))
    assert [how for how, _ in mirror.requests] == ["missing", "good"] * 2
    download.MIRRORS["cifar10"] = [f"{mirror.address}/missing/tiny.bin.gz"]
    with refused("cifar10 could not be downloaded", "404", "tiny.bin.gz or tiny.py.gz", "by hand",
                 "--dataset shapes"):
        data.load("cifar10", tmp_path)
    put(tmp_path, file=b"mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with refused(place, "--data_dir") as caught:
            data.load("cifar10", place)
        assert "Mirrors" not in str(caught.value) and (tmp_path / "file").read_bytes() == b"mine"


def test_damaged_files(blobs, tmp_path):
    """A damaged file is named, with what to do, and is left as it was."""
    def check(place, file, content, *words):
        put(place, **{file: content})
        with refused(*words) as caught:
            data.load("cifar10", tmp_path)
        assert "\n" not in str(caught.value) and (place / file).read_bytes() == content
    good = blobs["tiny.bin.gz"]
    check(tmp_path, "tiny.bin.gz", good[:-9], tmp_path / "tiny.bin.gz", len(good) - 9, "Remove it")
    check(tmp_path, "tiny.bin.gz", bytes([good[0] ^ 1]) + good[1:], "md5", "Remove it")
    check(tmp_path, "tiny.bin.gz", b"", "0 bytes")
    short = tar_gz({"bin/a": blobs["bin/a"], "../bin/b": blobs["bin/b"]})
    download.FILES["tiny.bin.gz"] = (len(short), md5(short))
    check(tmp_path, "tiny.bin.gz", short, "does not contain bin/b")
    binary, a = tmp_path / "bin", blobs["bin/a"]
    put(binary, a=a)
    check(binary, "b", blobs["bin/b"], binary, "lacks c")
    put(binary, c=blobs["bin/c"])
    check(binary, "a", a[:-1], "a in " + str(binary), f"{len(a) - 1} bytes")
    check(binary, "a", b"\x0a" + a[1:], str(binary), "label 10 is not one of 0 to 9")
    put(binary, a=a)
    assert is_tiny(data.load("cifar10", tmp_path))


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_hostile_pickle(blobs, tmp_path):
    """Only what an array needs is called; everything else is refused before it runs."""
    python = put(tmp_path / "py", **{n: blobs[f"py/{n}"] for n in "xyz"})
    mark = tmp_path / "mark"
    assert is_tiny(data.load("cifar10", tmp_path))
    for evil in (Evil(os.system, (f"touch {mark}",)), Evil(exec, (f"open('{mark}', 'w')",)),
                 Evil(np.load, (str(mark),)), Evil(getattr, ("", "join")),
                 Evil(np.ndarray.tofile, (np.ones(3), str(mark)))):
        for protocol in (0, 2, 4):
            content = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [evil] * 4}
            put(python, x=pickle.dumps(content, protocol))
            with refused(python, "it asks for", "x in"):
                data.load("cifar10", tmp_path)
    assert not mark.exists()
    good = blobs["py/x"]
    for blob in (pickle.dumps([1, 2]), good[:200], b"", good.replace(b"labels", b"fables"),
                 as_python(TINY[0][0][:3], [0, 1, 2]), as_python(TINY[0][0], [0, 1, 2])):
        put(python, x=blob)
        with refused("x in", python, "replace it"):
            data.load("cifar10", tmp_path)


def test_fingerprint(blobs, tmp_path):
    """The same for each form of the same images; another where an image or a label differs."""
    def check(**how):
        return data.load("cifar10", tmp_path, **how).fingerprint
    prints = []
    for form, names in (("bin", "abc"), ("py", "xyz")):
        place = put(tmp_path / form, **{n: blobs[f"{form}/{n}"] for n in names})
        prints.append(data.load("cifar10", place).fingerprint)
    assert prints[0] == prints[1] != check(train_size=5)
    for file in "ac":
        for at in (0, 9):                                       # a label, a pixel
            blob = bytearray(blobs[f"bin/{file}"])
            blob[at] = blob[at] ^ 1
            prints.append(data.load("cifar10", put(tmp_path / "bin", **{file: blob})).fingerprint)
        put(tmp_path / "bin", **{file: blobs[f"bin/{file}"]})
    assert len(set(prints)) == 5


# ---------------------------------------------------------------- Fashion-MNIST, paths

def test_fashion(mirror, monkeypatch, tmp_path):  # noqa: F811
    """Four idx files, found or downloaded, verified, and of the right layout."""
    def idx(array):
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        return gzip.compress(header + array.astype(np.uint8).tobytes(), 1)
    images, labels = np.arange(5 * 784).reshape(5, 28, 28) % 251, np.arange(5) + 4
    blobs = dict(zip(data.FASHION, map(idx, (images, labels, images[:3], labels[:3]))))
    mirror.blobs.update(blobs)
    for name, blob in blobs.items():
        monkeypatch.setitem(download.FILES, name, (None, md5(blob)))
    monkeypatch.setitem(download.MIRRORS, "fashion_mnist",
                        [f"{mirror.address}/missing/", f"{mirror.address}/good/"])
    with refused("lacks", *data.FASHION):
        data.load("fashion_mnist", tmp_path, download=False)
    for place in (tmp_path, tmp_path / "fashion-mnist"):
        got = data.load("fashion_mnist", place)
        assert torch.equal(got.train_images, torch.from_numpy(images.astype(np.uint8))[:, None])
        assert got.test_labels.tolist() == [4, 5, 6] and got.test_images.shape == (3, 1, 28, 28)
    assert len(mirror.requests) == 8
    put(tmp_path / "fashion-mnist", **{data.FASHION[1]: blobs[data.FASHION[3]]})
    with refused(data.FASHION[1], "Remove it"):
        data.load("fashion_mnist", tmp_path)
    download.FILES[data.FASHION[1]] = download.FILES[data.FASHION[3]]
    with refused("does not fit"):
        data.load("fashion_mnist", tmp_path)


def test_home(monkeypatch, tmp_path):
    """~ is the home folder; an unknown user's is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path, file=b"")
    with refused(tmp_path / "file"):
        data.load("cifar10", "~/file", download=False)
    with refused("~who?/x", "in full"):
        data.load("cifar10", "~who?/x", download=False)


def test_command_line():
    """`python data.py`: exit status 2 with a sentence."""
    wrong = subprocess.run([sys.executable, Path(data.__file__), "imagenet"], capture_output=True,
                           text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and not wrong.stdout
    assert "imagenet" in wrong.stderr and "shapes" in wrong.stderr


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
