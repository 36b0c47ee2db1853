"""data.py: every file form, damage, downloads from a server on this machine, and batches.

    python test_data.py          # half a minute; no network, no real data set
    python test_data.py images   # ImageNet's pipeline alone
"""
import contextlib
import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import augment
import data
import download
import images as pictures
import text as texts
from test_math import close, run_tests, skip

# A shell that starts this in the background lets it, and so its children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------- helpers: a tiny CIFAR

def data_error(call, *words):
    """The message of the DataError that `call` raises, which must hold all the words."""
    try:
        call()
    except download.DataError as error:
        message = str(error)
        for word in words:
            assert str(word) in message, f"'{word}' is not in: {message}"
        return message
    raise AssertionError("no DataError was raised")


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


def md5(blob):
    return "md5:" + hashlib.md5(blob).hexdigest()


@contextlib.contextmanager
def tiny_cifar(mirrors=()):
    """data.py with a CIFAR-10 of 2 x 4 training and 3 test images; yields {name: bytes}.

    The names are those of the two archives and of the files in them.
    """
    parts = [tiny_images(seed, count) for seed, count in ((0, 4), (1, 4), (2, 3))]
    binary = {f"bin/{name}": as_binary(*part) for name, part in zip("abc", parts)}
    python = {f"py/{name}": as_python(*part) for name, part in zip("xyz", parts)}
    blobs = {"tiny.bin.gz": tar_gz(binary), "tiny.py.gz": tar_gz(python), **binary, **python}
    files = {name: (len(blobs[name]), md5(blobs[name])) for name in ("tiny.bin.gz", "tiny.py.gz")}
    releases = (data.Release("tiny.bin.gz", "bin", 1, {"a": 4, "b": 4}, {"c": 3}),
                data.Release("tiny.py.gz", "py", b"labels", {"x": 4, "y": 4}, {"z": 3}))
    with mock.patch.dict(download.FILES, files), mock.patch.dict(
            data.RELEASES, cifar10=releases), mock.patch.dict(download.MIRRORS, cifar10=mirrors):
        yield blobs


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def is_tiny(loaded, train=8):
    images = np.concatenate([tiny_images(0, 4)[0], tiny_images(1, 4)[0]])[:train]
    labels = np.concatenate([tiny_images(0, 4)[1], tiny_images(1, 4)[1]])[:train]
    assert torch.equal(loaded.train_images, torch.from_numpy(images))
    assert torch.equal(loaded.train_labels, torch.from_numpy(labels))
    assert torch.equal(loaded.test_images, torch.from_numpy(tiny_images(2, 3)[0]))
    assert loaded.train_images.dtype == torch.uint8 and loaded.train_labels.dtype == torch.int64
    return True


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# ---------------------------------------------------------------- helpers: a mirror

class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves /HOW/NAME from `blobs`, well or badly according to HOW."""
    blobs, requests = {}, []

    def do_GET(self):
        how, name = self.path.strip("/").split("/")
        start = int(re.sub(r"\D", "", self.headers["Range"] or "0"))
        self.requests.append((how, start))
        blob = self.blobs[name]
        if how == "missing":
            return self.send_error(404)
        if how == "norange":
            start = 0
        if how == "wrong":
            blob = bytes(len(blob))
        if how == "page":
            blob, start = b"<html>log in</html>", 0
        if start >= len(blob):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(blob) - 1}/{len(blob)}")
        self.send_header("Content-Length", str(len(blob) - start))
        self.end_headers()
        rest = blob[start:]
        if how == "breaks" and start == 0:
            rest = rest[:len(rest) // 2]
        if how == "slow":
            self.wfile.write(rest[:1000])
            time.sleep(20)
        self.wfile.write(rest)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def mirror(blobs):
    """A server on this machine; yields its address."""
    Mirror.blobs, Mirror.requests = blobs, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # an address no proxy is asked for, and no notes about every mirror on the terminal
    with mock.patch.dict(os.environ, no_proxy="127.0.0.1"), contextlib.redirect_stderr(
            io.StringIO()):
        yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch_tiny(*how, part=None, file="tiny.bin.gz", words=()):
    """Load a tiny CIFAR through mirrors that behave as `how` says.

    part: bytes of an earlier attempt. words: expect a DataError that holds them.
    Returns the (how, first byte) of the requests and what is left of the .part file.
    """
    with folder() as path, tiny_cifar() as blobs, mirror(blobs) as address:
        download.MIRRORS["cifar10"] = [f"{address}/{h}/{file}" for h in how]
        if part is not None:
            put(path, **{file + ".part": part(blobs[file])})
        left = path / (file + ".part")
        if words:
            data_error(lambda: data.load("cifar10", path), *words)
            assert not (path / file).exists()
        else:
            assert is_tiny(data.load("cifar10", path))
            assert (path / file).read_bytes() == blobs[file] and not left.exists()
        return list(Mirror.requests), left.read_bytes() if left.exists() else None


# ---------------------------------------------------------------- checks

def test_data_shapes():
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
    close("shapes: mean", pixels.mean((0, 2, 3)), large.mean, 2e-2)
    close("shapes: standard deviation", pixels.std((0, 2, 3)), large.std, 2e-2)
    for size in (0, -5):
        data_error(lambda: data.load("shapes", train_size=size), "train_size", size)


def test_data_augment():
    """Crop and flip against a loop over the images; normalise and cut out likewise."""
    images = torch.from_numpy(tiny_images(3, 40)[0])[:, :, :, :28]  # (40, 3, 32, 28)
    state = torch.Generator().manual_seed(5)
    got = data.crop_and_flip(images, torch.Generator().manual_seed(5), pad=3)
    top, left, mirrored = (torch.randint(n, (40, 1), generator=state) for n in (7, 7, 2))
    for i in range(40):
        want = F.pad(images[i], (3, 3, 3, 3))[:, top[i]:top[i] + 32, left[i]:left[i] + 28]
        assert torch.equal(got[i], want.flip(2) if mirrored[i] else want)
    assert {0, 6} <= set(top.flatten().tolist()) and 5 < mirrored.sum() < 35
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    x = augment.normalize(images, mean, std)
    want = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1)
    close("normalize", x, want, 1e-6)
    state = torch.Generator().manual_seed(6)
    got = data.cut_out(x, torch.Generator().manual_seed(6), 8)
    y, z = torch.randint(32, (40,), generator=state), torch.randint(28, (40,), generator=state)
    for i in range(40):
        want = x[i].clone()
        want[:, max(y[i] - 4, 0):y[i] + 4, max(z[i] - 4, 0):z[i] + 4] = 0
        assert torch.equal(got[i], want)


def test_data_batches():
    """An epoch depends on (seed, epoch) only; training drops a short batch, evaluation none."""
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 1, 8, 8)
    labels = torch.arange(50)

    def run(size=16, train=True, count=50, **how):
        how = {"crop": False, "seed": 1, "epoch": 2, **how} if train else how
        return list(data.batches(images[:count], labels[:count], size, train=train, mean=(0.0,),
                                 std=(1 / 255,), **how))

    for kind in ({"crop": True, "cutout": 4}, {}):
        for (x, y), (u, v) in zip(run(**kind), run(**kind)):
            assert torch.equal(x, u) and torch.equal(y, v)
    first = run()
    before = torch.random.get_rng_state()
    for other in ({"epoch": 3}, {"seed": 2}, {"epoch": 1, "seed": 2}):
        assert not torch.equal(first[0][1], run(**other)[0][1])
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are drawn
    for x, y in first:
        close("batches: image and label together", x[:, 0, 0, 0], y, 1e-4)
    assert [len(y) for _, y in first] == [16, 16, 16]
    assert len(torch.cat([y for _, y in first]).unique()) == 48
    assert [len(y) for _, y in run(count=10)] == [10]  # all there is
    evaluation = run(train=False)
    assert torch.equal(torch.cat([y for _, y in evaluation]), labels) and len(evaluation) == 4
    for count, size in ((50, 16), (48, 16), (16, 16), (10, 16), (1, 1)):
        for train in (True, False):
            assert len(run(size, train, count)) == data.num_batches(count, size, train)


def test_data_cifar_forms():
    """Unpacked folder or archive, binary or Python, in data_dir or being it: the same images."""
    with folder() as path, tiny_cifar() as blobs:
        def load(folder, **how):
            return data.load("cifar10", folder, download=False, **how)
        for archive in ("tiny.bin.gz", "tiny.py.gz"):
            place = put(path / f"only_{archive}", **{archive: blobs[archive]})
            assert is_tiny(load(place)) and archive in load(place).source
        binary = put(path / "all" / "bin", **{n: blobs[f"bin/{n}"] for n in "abc"})
        python = put(path / "all" / "py", **{n: blobs[f"py/{n}"] for n in "xyz"})
        assert is_tiny(load(path / "all")) and "bin" in load(path / "all").source
        python.rename(path / "renamed")
        for place in (binary, str(path / "renamed")):
            assert is_tiny(load(place)) and str(place) in load(place).source
        assert is_tiny(load(binary, train_size=5), 5)
        data_error(lambda: load(binary, train_size=9), "train_size is 9", "8")
        data_error(lambda: load(path / "nowhere"), "nowhere", "tiny.bin.gz", "--dataset shapes")
        data_error(lambda: data.load("mnist"), "mnist", "cifar10", "shapes")
        # what numpy of today writes: two ways to the same array
        content = {b"data": tiny_images(0, 4)[0].reshape(4, 3072), b"labels": [1, 2, 3, 4]}
        for blob in (pickle.dumps(content, 2), pickle.dumps(content, 4)):
            assert (data.parse_pickle(blob, "x", b"labels", 4)[0] == content[b"data"]).all()


def test_data_damaged_files():
    """A damaged file is named, with what to do, and is left as it was."""
    with folder() as path, tiny_cifar() as blobs:
        def check(place, file, content, *words):
            put(place, **{file: content})
            message = data_error(lambda: data.load("cifar10", path), *words)
            assert "\n" not in message and (place / file).read_bytes() == content
            return message
        good = blobs["tiny.bin.gz"]
        check(path, "tiny.bin.gz", good[:-9], path / "tiny.bin.gz", len(good), "Remove it")
        check(path, "tiny.bin.gz", bytes([good[0] ^ 1]) + good[1:], "md5", "Remove it")
        check(path, "tiny.bin.gz", b"", "0 bytes")
        short = tar_gz({"bin/a": blobs["bin/a"], "../bin/b": blobs["bin/b"]})
        download.FILES["tiny.bin.gz"] = (len(short), md5(short))
        check(path, "tiny.bin.gz", short, "does not contain bin/b")
        binary, a = path / "bin", blobs["bin/a"]
        put(binary, a=a, b=blobs["bin/b"])
        data_error(lambda: data.load("cifar10", path), binary, "lacks c")
        put(binary, c=blobs["bin/c"])
        check(binary, "a", a[:-1], "a in " + str(binary), f"{len(a) - 1} bytes")
        check(binary, "a", b"\x0a" + a[1:], str(binary), "label 10 is not one of 0 to 9")
        put(binary, a=a)
        assert is_tiny(data.load("cifar10", path))


def test_data_hostile_pickle():
    """Only what an array needs is called; everything else is refused before it runs."""
    class Evil:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call

    with folder() as path, tiny_cifar() as blobs:
        python = put(path / "py", **{n: blobs[f"py/{n}"] for n in "xyz"})
        mark = path / "mark"
        assert is_tiny(data.load("cifar10", path))
        for evil in (Evil(os.system, (f"touch {mark}",)), Evil(exec, (f"open('{mark}', 'w')",)),
                     Evil(np.load, (str(mark),)), Evil(getattr, ("", "join")),
                     Evil(np.ndarray.tofile, (np.ones(3), str(mark)))):
            for protocol in (0, 2, 4):
                content = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [evil] * 4}
                put(python, x=pickle.dumps(content, protocol))
                data_error(lambda: data.load("cifar10", path), python, "it asks for", "x in")
        assert not mark.exists()
        good = blobs["py/x"]
        other = (pickle.dumps([1, 2]), good[:200], b"", good.replace(b"labels", b"fables"),
                 as_python(tiny_images(0, 3)[0], [0, 1, 2]),
                 as_python(tiny_images(0, 4)[0], [0, 1, 2]))
        for blob in other:
            put(python, x=blob)
            data_error(lambda: data.load("cifar10", path), "x in", python, "replace it")


def test_data_download():
    """Mirrors in turn, resuming, verifying; a failure leaves everything for the next attempt."""
    assert fetch_tiny("good") == ([("good", 0)], None)
    assert fetch_tiny("good", file="tiny.py.gz")[1] is None
    assert fetch_tiny("missing", "page", "good")[0] == [("missing", 0), ("page", 0), ("good", 0)]

    def half(blob):
        return blob[:5000]

    assert fetch_tiny("good", part=half)[0] == [("good", 5000)]
    assert fetch_tiny("norange", part=half)[0] == [("norange", 5000)]
    assert fetch_tiny("good", part=lambda blob: blob)[0][0][0] == "good"  # only the rename was left
    # a break is mended at the same mirror; bytes of another file are dropped
    requests = fetch_tiny("breaks")[0]
    assert len(requests) == 2 and requests[1][1] > 5000
    assert fetch_tiny("good", part=lambda blob: b"x" * 5000)[0] == [("good", 5000), ("good", 0)]
    assert fetch_tiny("good", part=lambda blob: blob + b"x")[0][-1] == ("good", 0)
    assert fetch_tiny("wrong", "good")[0] == [("wrong", 0), ("good", 0)]
    assert fetch_tiny("wrong", "good", part=half)[0] == [("wrong", 5000), ("wrong", 0), ("good", 0)]
    # none delivers: one message, and what had arrived stays
    words = ("cifar10 could not be downloaded", "404", "offers 19 bytes", "/page/tiny.bin.gz",
             "tiny.bin.gz or tiny.py.gz", "by hand", "--dataset shapes")
    requests, left = fetch_tiny("missing", "page", part=half, words=words)
    assert len(left) == 5000
    assert fetch_tiny("wrong", words=["wrong checksum"])[1] is None


def test_data_download_fails_soon():
    """Nobody there, a name that does not resolve, a mirror that falls silent."""
    start = time.time()
    with folder() as path, tiny_cifar() as blobs, mirror(blobs) as address, mock.patch.object(
            download, "TIMEOUT", 0.3):
        download.MIRRORS["cifar10"] = [f"http://127.0.0.1:1/{name}" for name in download.FILES][-2:] + [
            "http://name.invalid/tiny.bin.gz", f"{address}/slow/tiny.bin.gz"]
        data_error(lambda: data.load("cifar10", path), "refused", "name.invalid", "no answer")
        assert 0 < (path / "tiny.bin.gz.part").stat().st_size < len(blobs["tiny.bin.gz"])
        # one that cannot be written to says so, and no mirror is blamed
        (path / "file").write_text("mine")
        for place in (path / "file", path / "file" / "below"):
            message = data_error(lambda: data.load("cifar10", place), place, "--data_dir")
            assert "Mirrors" not in message and (path / "file").read_text() == "mine"
    assert time.time() - start < 8


def test_data_fashion():
    """Four idx files, found or downloaded, verified, and of the right layout."""
    def idx(array):
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        return gzip.compress(header + array.astype(np.uint8).tobytes(), 1)
    images, labels = np.arange(5 * 784).reshape(5, 28, 28) % 251, np.arange(5) + 4
    arrays = (images, labels, images[:3], labels[:3])
    blobs = dict(zip(data.FASHION, map(idx, arrays)))
    files = {name: (None, md5(blob)) for name, blob in blobs.items()}
    with folder() as path, mock.patch.dict(download.FILES, files), mirror(blobs) as address, \
            mock.patch.dict(download.MIRRORS, fashion_mnist=[f"{address}/missing/",
                                                         f"{address}/good/"]):
        data_error(lambda: data.load("fashion_mnist", path, download=False), "lacks", *data.FASHION)
        for place in (path, path / "fashion-mnist"):
            got = data.load("fashion_mnist", place)
            assert torch.equal(got.train_images, torch.from_numpy(images.astype(np.uint8))[:, None])
            assert got.test_labels.tolist() == [4, 5, 6] and got.test_images.shape == (3, 1, 28, 28)
        assert len(Mirror.requests) == 8
        put(path / "fashion-mnist", **{data.FASHION[1]: blobs[data.FASHION[3]]})
        data_error(lambda: data.load("fashion_mnist", path), data.FASHION[1], "Remove it")
        download.FILES[data.FASHION[1]] = files[data.FASHION[3]]
        data_error(lambda: data.load("fashion_mnist", path), "does not fit")


def test_data_home():
    """~ is the home folder wherever a path is taken; an unknown user's is refused."""
    with folder() as home, mock.patch.dict(os.environ, HOME=str(home), USERPROFILE=str(home)):
        put(home, text=b"ab" * 9, file=b"")
        assert len(texts.load_text("~/text").train) == 16
        for call in (lambda path: data.load("cifar10", path, download=False),
                     lambda path: texts.load_text("wikitext2", path, download=False),
                     lambda path: pictures.open_images(path, "train"),
                     lambda path: pictures.pack(path, home, 8)):
            data_error(lambda: call("~/file"), home / "file")
            data_error(lambda: call("~who?/x"), "~who?/x", "in full")
        data_error(lambda: texts.load_text("~who?/text"), "~who?/text", "in full")
        data_error(lambda: pictures.pack(home, "~who?/x", 8), "~who?/x", "in full")


def test_data_command_line():
    """`python data.py`: exit status 2 with a sentence; Ctrl-C keeps what has arrived."""
    script = Path(data.__file__)
    code = ("import sys, data, download; download.MIRRORS['cifar100'] = [sys.argv.pop()]; "
            "download.FILES['a'] = (None, 'md5:0'); sys.exit(data.main())")
    with folder() as path, mirror({"a": bytes(5000)}) as address:
        slow = subprocess.Popen([sys.executable, "-c", code, "cifar100", "--data-dir", path,
                                 f"{address}/slow/a"], stderr=subprocess.PIPE, text=True,
                                cwd=script.parent)
        wrong = subprocess.run([sys.executable, script, "imagenet"], capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and not wrong.stdout
        assert "imagenet" in wrong.stderr and "shapes" in wrong.stderr
        deadline = time.time() + 30
        while not (path / "a.part").exists() and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        slow.send_signal(signal.SIGINT)
        errors = slow.communicate(timeout=30)[1]
        assert slow.returncode == 130 and "Traceback" not in errors, errors
        assert (path / "a.part").exists()


# ---------------------------------------------------------------- ImageNet: helpers

def needs_pillow():
    try:
        import PIL.Image
    except ImportError:
        skip("Pillow is not installed (pip install pillow)")
    return PIL.Image


@contextlib.contextmanager
def without_pillow():
    """As if Pillow were not installed."""
    augment.pillow.cache_clear()
    with mock.patch.dict(sys.modules, PIL=None):
        yield
    augment.pillow.cache_clear()


def smooth_image(seed, height, width):
    """An (H, W, 3) uint8 array with structure at all scales."""
    return augment.random_state(seed).integers(0, 2, (height, width, 3)).cumsum(0).cumsum(1).astype(
        np.uint8) ^ augment.random_state(seed, 1).integers(0, 32, (height, width, 3), np.uint8)


def class_folders(root, train=(5, 4), val=(2, 2), suffix=".jpg"):
    """root/{train,val}/{cat,dog}/<i>.jpg, images of several sizes."""
    Image = needs_pillow()
    for split, counts in (("train", train), ("val", val)):
        for name, count in zip(("cat", "dog", "eel"), counts):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(smooth_image(i, 40 + 5 * i, 61 - 3 * i))
                image.save(root / split / name / f"{name}_{i}{suffix}")
    return root


def epoch_of(source, transform, batch_size=4, epoch=0, skip=0, **how):
    """All batches of one epoch."""
    how = {"seed": 3, "train": True, **how}
    with warnings.catch_warnings():  # torch finds three workers many for a small machine
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = pictures.ImageLoader(source, transform, batch_size, **how)
        loader.set_epoch(epoch, skip)
        return list(loader)


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for x, y in zip(some, others) for a, b in zip(x, y))


# ---------------------------------------------------------------- ImageNet: checks

def test_images_order():
    """DeiT's repeated augmentation, step by step and as published; plain shuffling; shards."""
    published = {0: ("172 137 235 195 269 373 369 420", "172 137 159 195 269 115 369 420",
                     "172 235 159 195 373 115 369 445", "137 235 159 269 373 115 420 445"),
                 1: ("37 158 476 31 123 165 295 262", "37 158 186 31 123 223 295 262",
                     "37 476 186 31 165 223 295 214", "158 476 186 123 165 223 262 214")}
    for epoch, ranks in published.items():
        for rank, first in enumerate(ranks):
            order = pictures.training_order(512, 0, epoch, rank, 4, 3)[0]
            assert len(order) == 128 and order[:8].tolist() == list(map(int, first.split()))
    for count, world, repeats in ((300, 4, 3), (1000, 3, 2), (256, 8, 4), (600, 5, 2.5)):
        perm = torch.randperm(count, generator=torch.Generator().manual_seed(7 + 2)).tolist()
        entries = [perm[int(i // repeats)] for i in range(int(count * repeats))]
        entries += entries[:-len(entries) % world]
        for rank in range(world):
            want = entries[rank::world][:count // 256 * 256 // world]
            assert pictures.training_order(count, 7, 2, rank, world, repeats)[0].tolist() == want
    ranks = [pictures.training_order(10, 0, 5, rank, 4) for rank in range(4)]
    assert [len(indices) for indices, _ in ranks] == [3] * 4  # two images come twice
    assert set(np.concatenate([indices for indices, _ in ranks])) == set(range(10))
    assert sorted(np.concatenate([positions for _, positions in ranks])) == list(range(12))

    def lengths(count, size, **how):
        source = pictures.dummy_images(count, 4, 3)
        loader = pictures.ImageLoader(source, None, size, seed=0, **{"train": True, **how})
        assert sum(1 for _ in loader.plan) == len(loader)
        return [len(indices) for indices, _, _ in loader.plan]

    assert lengths(10, 4) == [4, 4, 2] and lengths(10, 4, recipe="timm") == [4, 4]
    assert lengths(300, 25, world=4, repeats=3) == [25, 25, 14]
    assert sum(lengths(300, 25, world=1, repeats=3)) == 300  # alone: plain, as published
    message = data_error(lambda: lengths(255, 5, world=2, repeats=3), "255", "blocks of 256")
    print(f"    {message}")
    print("    " + data_error(lambda: lengths(10, 6, recipe="timm", world=2), "10", "batch of 6"))
    shards = [lengths(3, 1, train=False, rank=rank, world=4) for rank in range(4)]
    assert shards == [[1], [1], [1], []]


def test_images_random_state():
    """Numbers of another length are another stream; numpy alone takes missing ones for zeros."""
    streams = [(3,), (3, 0), (3, 0, 0), (3, 0, 0, 0), (0, 3), (3, 2), (3, 1, 2), (3, 1, 2, 0),
               (3, 1, 2, 4), (3, 1, 2, 3)]
    first = {int(augment.random_state(*numbers).integers(2 ** 62)) for numbers in streams}
    assert len(first) == len(streams), first


def test_images_loader():
    """The same tensors from 0, 1 and 3 workers and after a resume; nothing is drawn elsewhere."""
    source = pictures.dummy_images(50, 24, 7, seed=1)
    transform = augment.train_transform("timm", 16)
    how = {"rank": 1, "world": 2, "recipe": "timm"}
    before = torch.random.get_rng_state()
    for epoch in (0, 4):
        want = epoch_of(source, transform, epoch=epoch, **how)
        for workers in (1, 3) if epoch else (3,):
            assert same(want, epoch_of(source, transform, epoch=epoch, workers=workers, **how))
        assert same(want[2:], epoch_of(source, transform, epoch=epoch, skip=2, **how))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(want) == 6 and want[0][0].shape == (4, 3, 16, 16)
    assert want[0][0].dtype == torch.uint8 and want[0][1].dtype == torch.int64
    loader = pictures.ImageLoader(source, transform, 4, seed=3, train=True, workers=2, **how)
    for _ in loader:  # leave an epoch early, then have another of the same workers
        break
    loader.set_epoch(4)
    assert same(want, list(loader)) and len(loader) == 6
    assert not same(want, epoch_of(source, transform, epoch=5, **how))
    # one process that takes the batches of both ranks sees the same samples
    parts = [epoch_of(source, transform, 5, epoch=4, rank=rank, world=2) for rank in range(2)]
    for whole, left, right in zip(epoch_of(source, transform, 10, epoch=4), *parts):
        assert torch.equal(whole[0][0::2], left[0]) and torch.equal(whole[0][1::2], right[0])
    # evaluation: everything once, in order
    fixed = augment.eval_transform(16, 16)
    shards = [epoch_of(source, fixed, 8, train=False, rank=rank, world=3) for rank in range(3)]
    labels = np.empty(50, np.int64)
    for rank, shard in enumerate(shards):
        labels[rank::3] = torch.cat([y for _, y in shard])
    assert (labels == source.labels).all() and 0 <= labels.min() and labels.max() <= 6


def test_images_crop():
    """Share of the area, ratio and place of a random crop; what happens when none fits."""
    rng = augment.random_state(0)
    boxes = np.array([augment.random_crop(400, 400, (0.1, 0.4), (3 / 4, 4 / 3), rng)
                      for _ in range(4000)])
    top, left, h, w = boxes.T
    area, aspect = h * w / 400 ** 2, np.log(w / h)
    close("crop: mean share of the area", area.mean(), 0.25, 1e-2)
    close("crop: its variance, of a uniform one", area.var(), 0.3 ** 2 / 12, 5e-2)
    close("crop: variance of log ratio", aspect.var(), (2 * math.log(4 / 3)) ** 2 / 12, 5e-2)
    assert abs(aspect.mean()) < 0.01 and area.min() > 0.098 and area.max() < 0.402
    close("crop: rows uniform", (top / (400 - h)).mean(), 0.5, 3e-2)
    close("crop: columns uniform", (left / (400 - w)).var(), 1 / 12, 5e-2)
    corners = {augment.random_crop(3, 3, (0.4, 0.5), (1, 1), rng)[:2] for _ in range(200)}
    assert corners == {(i, j) for i in range(2) for j in range(2)}
    assert augment.random_crop(33, 500, (1, 1), (3 / 4, 4 / 3), rng) == (0, 228, 33, 44)
    assert augment.random_crop(500, 33, (1, 1), (3 / 4, 4 / 3), rng) == (228, 0, 44, 33)
    assert augment.random_crop(1, 1, (0.08, 1), (3 / 4, 4 / 3), rng) == (0, 0, 1, 1)
    assert augment.random_crop(8, 8, (1, 1), (50, 90), rng) == (3, 0, 1, 8)     # not of no height


def filtered(image, size, interpolation):
    """An antialiased resize of (H, W, 3), from the definition of its filter, in float64."""
    def cubic(x):  # Keys's, a = -1/2
        return np.where(x < 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1,
                        np.where(x < 2, -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2, 0))
    kernel = {"bilinear": lambda x: np.maximum(0, 1 - x), "bicubic": cubic}[interpolation]
    for axis, out in enumerate(size):
        scale = image.shape[axis] / out
        centre = (np.arange(out) + 0.5)[:, None] * scale
        weights = kernel(np.abs(np.arange(image.shape[axis]) + 0.5 - centre) / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def test_images_resize():
    """Cut out, filtered, flipped and centred as defined; images of Pillow and arrays alike."""
    array = smooth_image(2, 90, 130) // 2 + 60  # not where levels are cut off
    kinds = [array]
    with contextlib.suppress(ImportError):
        from PIL import Image
        kinds.append(Image.fromarray(array))
    for image in kinds:
        for box, size in (((10, 20, 70, 90), (40, 40)), ((0, 0, 50, 30), (64, 64)),
                          ((0, 0, 90, 130), (90, 130)), ((3, 5, 1, 2), (24, 24))):
            for interpolation in augment.INTERPOLATIONS:
                got = augment.resize(image, box, size, interpolation).permute(1, 2, 0)
                top, left, h, w = box
                want = filtered(array[top:top + h, left:left + w].astype(float), size,
                                interpolation)
                worst = np.abs(got.double().numpy() - want).max()
                assert worst < 1.8, (interpolation, box, size, worst)
        # long side floor(50·130/90) = 72; offsets round(5) and round(16); round(2.5) = 2
        got = augment.eval_transform(50, 40)(image)
        whole = augment.resize(image, (0, 0, 90, 130), (50, 72), "bilinear")
        assert torch.equal(got, whole[:, 5:45, 16:56])
        whole = augment.resize(image, (0, 0, 90, 130), (45, 65), "bicubic")
        got = augment.eval_transform(45, 40, "bicubic")(image)
        assert torch.equal(got, whole[:, 2:42, 12:52])
        for seed in range(6):
            plain, flipped = (augment.train_transform("torchvision", 24, hflip=p)(
                image, augment.random_state(seed)) for p in (0, 1))
            assert torch.equal(plain.flip(2), flipped) and plain.is_contiguous()
            assert torch.equal(plain, augment.train_transform("torchvision", 24, hflip=0)(
                array, augment.random_state(seed)))
    with contextlib.suppress(IndexError):
        want = kinds[1].resize((60, 60), Image.Resampling.BILINEAR)
        got = augment.resize(kinds[1], (0, 0, 90, 130), (60, 60), "bilinear").permute(1, 2, 0)
        close("as Pillow does it, of 255", got.double() / 255,
              np.asarray(want).astype(float) / 255, 2 / 255)
    data_error(lambda: augment.eval_transform(200, 224), "224", "200")


def test_images_finish():
    """Normalise, erase and mix in each recipe's order; CutMix's λ is the share of pixels."""
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 20, 30) * 30
    labels = torch.arange(8)

    def make(**how):
        return augment.Finish(mean, std, 10, **how)

    plain = make()
    x, target = plain(images, labels, (1, 2))
    assert target is labels and torch.equal(x, augment.normalize(images, mean, std))
    assert torch.equal(x, plain.eval(images))
    for recipe in ("torchvision", "timm"):
        partner = (lambda t: t.flip(0)) if recipe == "timm" else (lambda t: t.roll(1, 0))
        shares, kept = [], []
        for seed in range(20):
            cutmix = make(recipe=recipe, cutmix_alpha=1.0)
            x, target = cutmix(images, labels, (seed,))
            shares.append(target[torch.arange(8), labels])
            kept.append((x == plain.eval(images)).all(1).flatten(1).double().mean(1))
            assert torch.equal(x, cutmix(images, labels, (seed,))[0])
        close(f"{recipe}: λ and share of pixels", torch.stack(shares), torch.stack(kept), 1e-6)
        mixed, target = make(recipe=recipe, mixup_alpha=0.8)(images, labels, (3,))
        share = target[0, 0]
        want = images.double() * share + partner(images).double() * (1 - share)
        if recipe == "timm":
            want = want.round()
        close(f"{recipe}: mixup", mixed.double(), augment.normalize(want, mean, std, torch.float64),
              1e-5)
        # the order: torchvision's zeros are mixed with the neighbour, timm's noise is on top
        both = make(recipe=recipe, mixup_alpha=0.8, erase_prob=0.6, erase_mode="const")
        x, _ = both(images, labels, (3,))
        erased = (x == 0).all(1).flatten(1).any(1)
        assert erased.sum() >= 2 if recipe == "timm" else True
        rng = augment.random_state(3)
        both.draw_mix(20, 30, rng)
        if recipe == "timm":
            want = both.erase(mixed.clone(), rng)
        else:
            alone = both.erase(plain.eval(images), rng)
            want = alone * share + partner(alone) * (1 - share)
        close(f"{recipe}: mixed and erased in its order", x, want, 1e-6)
    assert make(mixup_alpha=1.0, mixup_prob=0.0)(images, labels, (0,))[1].max() == 1


def test_images_mixing_draws():
    """Each of mixup and CutMix asks for its own α, and they share the batches equally."""
    class Recorder:
        """Draws nothing special, and notes which α were asked for."""
        alphas = []

        def beta(self, a, b):
            self.alphas.append((a, b))
            return 0.5

        def random(self):
            return 0.7 if len(self.alphas) % 2 else 0.3

        def integers(self, n):
            return 0

    both = augment.Finish((0.1,) * 3, (0.4,) * 3, 10, mixup_alpha=0.2, cutmix_alpha=1.0)
    boxes = [both.draw_mix(8, 8, Recorder())[1] is not None for _ in range(2)]
    assert boxes == [True, False] and Recorder.alphas == [(1.0, 1.0), (0.2, 0.2)]
    chosen = [both.draw_mix(8, 8, augment.random_state(i))[1] is not None for i in range(2000)]
    close("CutMix's share of the batches", np.mean(chosen), 0.5, 6e-2)


def test_images_smoothing():
    """Smoothing the targets before mixing them or in the loss afterwards is the same."""
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    for recipe in ("torchvision", "timm"):
        smoothed, sharp = (augment.Finish((0,) * 3, (1,) * 3, 10, recipe=recipe, mixup_alpha=0.8,
                                       smoothing=s) for s in (0.1, 0.0))
        soft, hard = (finish(images, labels, (5,))[1] for finish in (smoothed, sharp))
        close("target sums to 1", soft.sum(1), torch.ones(6), 1e-6)
        close(f"{recipe}: smoothing before and after mixing", smoothed.loss(logits, soft),
              F.cross_entropy(logits, hard, label_smoothing=0.1), 1e-6)
        close("  and on labels", smoothed.loss(logits, labels),
              F.cross_entropy(logits, labels, label_smoothing=0.1), 0)


def test_images_erasing():
    """Rate, area, ratio and content of the erased rectangles, one for an image."""
    x = torch.full((3000, 3, 40, 50), 9.0)
    for recipe, mode, limit in (("torchvision", "const", 0.33), ("timm", "pixel", 1 / 3),
                                ("timm", "rand", 1 / 3)):
        finish = augment.Finish((0,) * 3, (1,) * 3, 2, recipe=recipe, erase_prob=0.25,
                             erase_mode=mode)
        got = finish.erase(x.clone(), augment.random_state(1))
        gone = (got != 9).any(1)
        close(f"{mode}: rate", gone.flatten(1).any(1).double().mean(), 0.25, 6e-2)
        boxes = gone[gone.flatten(1).any(1)]
        h, w = boxes.any(2).sum(1).double(), boxes.any(1).sum(1).double()
        assert torch.equal(boxes.flatten(1).sum(1), (h * w).long())  # a full rectangle each
        share, large = h * w / 2000, h * w > 200  # rounding changes small ones much
        assert share.min() > 0.015 and share.max() < limit + 0.02 and h.max() < 40 and w.max() < 50
        close(f"{mode}: mean share of the area", share.mean(), 0.17, 6e-2)
        assert 0.27 < (w / h)[large].min() < 0.4 and 2.6 < (w / h)[large].max() < 3.7
        filled = got[gone[:, None].expand_as(got)]
        if mode == "const":
            assert (filled == 0).all()
        else:
            close(f"{mode}: mean and deviation of the filling, of 1",
                  torch.stack((1 + filled.mean(), filled.std())), [1, 1],
                  1e-2 if mode == "pixel" else 1e-1)
            values = [got[i, 0][gone[i]].unique().numel() for i in gone.flatten(1).any(1)
                      .nonzero().flatten()[:20]]
            assert max(values) == 1 if mode == "rand" else min(values) > 10
        assert torch.equal(got, finish.erase(x.clone(), augment.random_state(1)))


def affine(image, matrix, fill):
    """Pillow's bilinear affine transform, from its definition: (H, W, 3) uint8."""
    a, b, c, d, e, f = matrix
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width] + 0.5
    u, v = a * x + b * y + c, d * x + e * y + f                    # in the source, (H, W)
    outside = (u < 0) | (u >= width) | (v < 0) | (v >= height)
    i, j = np.floor(v - 0.5).astype(int), np.floor(u - 0.5).astype(int)
    p, q = (v - 0.5 - i)[..., None], (u - 0.5 - j)[..., None]
    def at(rows, columns):
        return image[rows.clip(0, height - 1), columns.clip(0, width - 1)].astype(float)
    upper = at(i, j) + q * (at(i, j + 1) - at(i, j))
    lower = at(i + 1, j) + q * (at(i + 1, j + 1) - at(i + 1, j))
    out = np.floor(upper + p * (lower - upper) + 1e-9)
    return np.where(outside[..., None], fill, out).astype(np.uint8)


def by_formula(name, value, x, fill):
    """One operation of the policies on an (H, W, 3) uint8 array, without Pillow."""
    height, width, _ = x.shape
    f = x.astype(np.float32)
    grey = (x.astype(int) @ [19595, 38470, 7471] + 32768) >> 16

    def blend(base):
        return np.clip(base + np.float32(value) * (f - base), 0, 255).astype(np.uint8)

    def sharpness():
        base = f.copy()
        total = sum(f[i:height - 2 + i, j:width - 2 + j] for i in range(3) for j in range(3))
        base[1:-1, 1:-1] = np.floor((total + 4 * f[1:-1, 1:-1]) / 13 + 0.5)
        return blend(base)

    def autocontrast():
        low, high = f.min((0, 1)).astype(float), f.max((0, 1)).astype(float)
        scale = 255 / np.maximum(high - low, 1)
        return np.where(high > low, np.clip(np.trunc(x * scale - low * scale), 0, 255), x)

    def equalize():
        out = x.copy()
        for k in range(3):
            counts = np.bincount(x[..., k].ravel(), minlength=256)
            used = counts[counts > 0]
            step = (used.sum() - used[-1]) // 255
            if len(used) > 1 and step:
                table = (step // 2 + counts.cumsum() - counts) // step
                out[..., k] = np.minimum(table, 255)[x[..., k]]
        return out

    def rotate():
        t = -math.radians(value)
        cos, sin, cx, cy = math.cos(t), math.sin(t), width / 2, height / 2
        return affine(x, (cos, sin, cx - cos * cx - sin * cy, -sin, cos, cy + sin * cx - cos * cy),
                      fill)

    return {"identity": lambda: x, "brightness": lambda: blend(0), "invert": lambda: 255 - x,
            "color": lambda: blend(grey[..., None].astype(np.float32)),
            "contrast": lambda: blend(np.float32(int(grey.mean() + 0.5))),
            "sharpness": sharpness, "autocontrast": autocontrast, "equalize": equalize,
            "posterize": lambda: x // 2.0 ** (8 - value) * 2.0 ** (8 - value),
            "solarize": lambda: np.where(x < value, x, 255 - x),
            "solarize_add": lambda: np.where(x < 128, np.minimum(x + value, 255), x),
            "rotate": rotate,
            "shear_x": lambda: affine(x, (1, value, 0, 0, 1, 0), fill),
            "shear_y": lambda: affine(x, (1, 0, 0, value, 1, 0), fill),
            "translate_x": lambda: affine(x, (1, 0, value, 0, 1, 0), fill),
            "translate_y": lambda: affine(x, (1, 0, 0, 0, 1, value), fill)}[name]()


def test_images_operations():
    """Pillow's operations, all that the policies use, against formulas in numpy."""
    Image = needs_pillow()
    factors, slopes, pixels = (0.1, 0.19, 1, 1.81, 1.99), (-0.99, -0.27, 0.297), (-32, 0, 12.71, 90)
    values = {"identity": [None], "autocontrast": [None], "equalize": [None], "invert": [None],
              "brightness": factors, "color": factors, "contrast": factors, "sharpness": factors,
              "posterize": (-4, *range(9), 12), "solarize": (0, 26, 127.5, 255, 256),
              "solarize_add": (0, 99, 128), "rotate": (-135, -27, 4.5, 30), "shear_x": slopes,
              "shear_y": slopes, "translate_x": pixels, "translate_y": pixels}
    assert set(values) == set(augment.TRIVIAL_AUGMENT) | set(augment.RAND_AUGMENT)
    flat = np.full((8, 9, 3), (7, 7, 200), np.uint8)
    two = flat.copy()
    two[:4] = 250
    for name, some in values.items():
        for array in (smooth_image(3, 50, 40), smooth_image(4, 40, 64) // 3 + 20, flat, two):
            for value in some:
                got = np.asarray(augment.operate(Image.fromarray(array), name, value, "bilinear",
                                              augment.MEAN_COLOUR))
                want = by_formula(name, value, array, augment.MEAN_COLOUR)
                # Pillow adds up coordinates along a row: a few fall on the other side of a pixel's
                # edge, or of an integer's when levels are cut off
                inexact = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
                wrong = np.abs(got.astype(int) - want)
                assert (wrong > 0).mean() <= (0.02 if inexact else 0), (name, value)
                assert (wrong > 1).mean() <= 0.002, (name, value)
    # the colour jitter, which needs no Pillow, is made of the same operations
    array, tensor = smooth_image(5, 30, 30), torch.from_numpy(smooth_image(5, 30, 30))
    for seed in range(8):
        rng, image = augment.random_state(seed), Image.fromarray(array)
        got = augment.jitter(tensor.permute(2, 0, 1), 0.4, augment.random_state(seed))
        for k in rng.permutation(3):
            image = augment.operate(image, ("brightness", "contrast", "color")[k],
                                 rng.uniform(0.6, 1.4))
        difference = np.abs(np.asarray(image).astype(int) - got.permute(1, 2, 0).numpy())
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, seed


def drawn(policy, count, size=(200, 100)):
    """[[(name, value, filter), ...] for each image]: what a policy asks of `operate`."""
    log, image = [], mock.Mock(size=size)

    def record(image, name, value=None, interpolation="bilinear", fill=(0, 0, 0)):
        log[-1].append((name, value, interpolation, fill))
        return image

    with mock.patch.object(augment, "operate", record):
        for i in range(count):
            log.append([])
            policy(image, augment.random_state(11, i))
    return log


def test_images_policies():
    """What TrivialAugment and RandAugment draw: operations, strengths, signs, filters."""
    log = drawn(augment.trivial_augment, 4000)
    assert all(len(entry) == 1 and entry[0][2:] == ("bilinear", (0, 0, 0)) for entry in log)
    seen = {name: {entry[0][1] for entry in log if entry[0][0] == name}
            for name in augment.TRIVIAL_AUGMENT}
    rates = [np.mean([entry[0][0] == name for entry in log]) for name in seen]
    close("TrivialAugment: 14 operations alike", rates, [1 / 14] * 14, 0.25)
    assert seen["identity"] == seen["autocontrast"] == seen["equalize"] == {None}
    assert seen["posterize"] == {8, 7, 6, 5, 4, 3, 2}
    bits = [augment.trivial_value("posterize", i, 1) for i in (0, 2, 3, 7, 8, 12, 13, 22, 23, 27, 28)]
    assert bits == [8, 8, 7, 7, 6, 6, 5, 4, 3, 3, 2]
    for name, low, high in (("shear_x", -0.99, 0.99), ("shear_y", -0.99, 0.99),
                            ("translate_x", -32, 32), ("translate_y", -32, 32),
                            ("rotate", -135, 135), ("brightness", 0.01, 1.99),
                            ("color", 0.01, 1.99), ("contrast", 0.01, 1.99),
                            ("sharpness", 0.01, 1.99), ("solarize", 0, 255)):
        close(f"TrivialAugment: range of {name}", [min(seen[name]), max(seen[name])], [low, high],
              0.07)  # not each of 61 strengths must have come
    assert all(isinstance(pixels, int) for pixels in seen["translate_x"])

    policy = augment.RandAugment("rand-m9-mstd0.5-inc1")
    log = drawn(policy, 4000)
    counts = np.bincount([len(entry) for entry in log], minlength=3) / 4000
    close("RandAugment: images with 0, 1, 2 operations", counts, [0.25, 0.5, 0.25], 0.06)
    calls = [call for entry in log for call in entry]
    rates = [np.mean([call[0] == name for call in calls]) for name in augment.RAND_AUGMENT]
    close("RandAugment: 15 operations alike", rates, [1 / 15] * 15, 0.25)
    close("RandAugment: half bicubic", np.mean([c[2] == "bicubic" for c in calls]), 0.5, 0.06)
    assert {call[3] for call in calls} == {(124, 116, 104)}
    degrees = np.array([call[1] for call in calls if call[0] == "rotate"])
    close("RandAugment: mean of |degrees|", abs(degrees).mean(), 27, 0.02)
    close("RandAugment: signs", (degrees > 0).mean(), 0.5, 0.2)
    assert abs(degrees).max() == 30  # a magnitude above 10 is 10
    assert drawn(augment.RandAugment("rand-m9", "bilinear"), 40) != drawn(policy, 40)
    at9 = {name: policy.value(name, 0.9, 1, (200, 100)) for name in augment.RAND_AUGMENT}
    want = {"rotate": 27, "posterize": 1, "solarize": 26, "solarize_add": 99, "color": 1.81,
            "contrast": 1.81, "brightness": 1.81, "sharpness": 1.81, "shear_x": 0.27,
            "shear_y": 0.27, "translate_x": 81, "translate_y": 40.5}
    close("RandAugment: magnitude 9", [at9[name] for name in want], list(want.values()), 1e-12)
    close("  and the other sign", policy.value("color", 0.9, -1, (1, 1)), 0.19, 1e-12)
    assert policy.value("posterize", 1.0, 1, (1, 1)) == 0
    assert policy.value("brightness", 1.0, -1, (1, 1)) == 0.1


def test_images_policy_grammar():
    """The words of a policy, in any order, and what is wrong with the others."""
    policy = augment.RandAugment("rand-n3-p1.0-m7-mmax8-mstd101")
    assert (policy.layers, policy.prob, policy.magnitude, policy.increasing) == (3, 1.0, 7, False)
    log = drawn(policy, 600)
    assert all(len(entry) == 3 for entry in log)
    degrees = [abs(call[1]) for entry in log for call in entry if call[0] == "rotate"]
    close("mstd above 100: uniform from 0 to m", np.mean(degrees), 10.5, 0.15)
    assert max(degrees) <= 21 and augment.RandAugment("rand-inc0").increasing
    assert augment.RandAugment("rand").magnitude == 10
    plain = [policy.value(name, 0.9, -1, (1, 1)) for name in ("posterize", "solarize", "color")]
    close("not increasing: bits, threshold, factor", plain, [3, 230, 1.72], 1e-12)
    for text, word in (("rand-m9-x1", "x1"), ("rand-m", "'m'"), ("rand-m9.5", "m9.5"),
                       ("rand-w0", "w0"), ("rand--m9", "''"), ("rand-p1.2.3", "p1.2.3"),
                       ("rand-n0", "at least 1"), ("rand-p2", "at most 1")):
        data_error(lambda: augment.RandAugment(text), text, word)
    needs_pillow()
    print("    " + data_error(lambda: augment.train_transform("timm", 8, policy="rand-m9-x1"), "x1"))
    print("    " + data_error(lambda: augment.train_transform("timm", 8, policy="augmix"), "augmix",
                              "ta_wide"))
    Image = needs_pillow()
    image = Image.fromarray(smooth_image(1, 30, 30))
    black = augment.operate(image, "posterize", 0)
    assert np.asarray(black).max() == 0
    for policy in ("rand-m10-p1-n3-inc1", "rand-m3-p1", "ta_wide"):
        transform = pickle.loads(pickle.dumps(augment.train_transform("timm", 20, policy=policy)))
        for i in range(20):
            assert transform(image, augment.random_state(i)).shape == (3, 20, 20)
            assert torch.equal(transform(image, augment.random_state(i)),
                               transform(image, augment.random_state(i)))
        assert transform(smooth_image(1, 30, 30), augment.random_state(1)).dtype == torch.uint8


def test_images_folders():
    """Classes and files found, in which order; every kind of file comes out as RGB."""
    Image = needs_pillow()
    with folder() as path, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        augment.pillow.cache_clear()
        class_folders(path, (2, 1))
        cat = path / "train" / "cat"
        array = smooth_image(0, 30, 40)
        rgb = Image.fromarray(array)
        (cat / "sub").mkdir()
        (cat / "sub" / "up").symlink_to(cat)  # does not end in a loop
        rgb.convert("CMYK").save(cat / "a.JPEG")
        rgb.convert("L").save(cat / "b.Jpg")
        rgb.save(cat / "c.JPEG", "PNG")  # a PNG by content
        rgb.convert("RGBA").save(cat / "d.png")
        rgb.convert("P").save(cat / "sub" / "e.png")
        broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0"
        rgb.save(cat / "f.jpg", exif=broken)
        (cat / "g.jpg").symlink_to(cat / "d.png")
        for hidden in ("train/.cache/x.jpg", "train/cat/.h.jpg", "train/cat/notes.txt"):
            (path / hidden).parent.mkdir(exist_ok=True)
            (path / hidden).write_text("not an image")
        train = pictures.open_images(path, "train")
        for rank, quiet in (("0", None), ("1", True)):
            with mock.patch.dict(os.environ, RANK=rank), mock.patch.object(pictures, "tqdm") as bar:
                bar.side_effect = lambda names, *_, **how: names
                pictures.open_images(path, "train")
            assert bar.call_args[1]["disable"] is quiet, (rank, bar.call_args)
        assert train.classes == ["cat", "dog"] and train.kind == "folder"
        assert [os.fsdecode(name) for name in train.names] == [
            "a.JPEG", "b.Jpg", "c.JPEG", "cat_0.jpg", "cat_1.jpg", "d.png", "f.jpg", "g.jpg",
            os.path.join("sub", "e.png"), "dog_0.jpg"]
        assert train.labels.tolist() == [0] * 9 + [1] and train.labels.dtype == np.int64
        images = [train.read(i) for i in range(10)]
        assert {image.mode for image in images} == {"RGB"}
        for exact in (2, 5, 7):
            assert (np.asarray(images[exact]) == array).all()
        assert (np.asarray(images[1])[..., 0] == np.asarray(images[1])[..., 2]).all()
        assert not caught, caught[0].message
        close("CMYK", np.asarray(images[0]).astype(float), array.astype(float), 0.4)
        (path / "val").rename(path / "validation")
        val = pictures.open_images(path, "val", train.classes)
        assert len(val) == 4 and "validation" in val.where
        want = epoch_of(train, augment.train_transform("torchvision", 12, policy="ta_wide"))
        got = epoch_of(train, augment.train_transform("torchvision", 12, policy="ta_wide"), workers=2)
        assert same(want, got)


def test_images_fewer():
    """Evenly spaced in a sorted source: classes keep their shares, and what is read is theirs."""
    source = pictures.dummy_images(90, 4, 5)
    source.labels.sort()
    for count in (1, 7, 45, 89, 90):
        fewer = pictures.FewerImages(source, count)
        assert len(fewer) == count == len(set(fewer.indices)) and fewer.classes == source.classes
        share = np.bincount(source.labels) * count / 90
        assert (abs(np.bincount(fewer.labels, minlength=5) - share) < 1).all(), (count, share)
        for i, j in enumerate(fewer.indices):
            assert (fewer.read(i) == source.read(j)).all() and fewer.labels[i] == source.labels[j]
    print("    " + data_error(lambda: pictures.FewerImages(source, 91), "91", "90 training images"))


def test_images_bad_folders():
    """One sentence for each thing that can be wrong with a folder or a file."""
    Image = needs_pillow()

    def fails(call, *words):
        message = data_error(call, *words)
        assert "\n" not in message and "Traceback" not in message, message
        print(f"    {message}")

    with folder() as path:
        fails(lambda: pictures.open_images(path / "nowhere", "train"), "nowhere", "not a folder")
        fails(lambda: pictures.open_images(path, "train"), "no folder 'train'", path)
        class_folders(path)
        train = pictures.open_images(path, "train")
        fails(lambda: pictures.open_images(path / "train", "train"), "no folder 'train'")
        fails(lambda: pictures.open_images(path, "test"), "no folder 'test'")
        (path / "val").rename(path / "away")
        fails(lambda: pictures.open_images(path, "val", train.classes), "no folder 'val'")
        (path / "away").rename(path / "val")
        (path / "val" / "dog").rename(path / "val" / "bird")
        fails(lambda: pictures.open_images(path, "val", train.classes), "'bird'", "'dog'")
        (path / "train" / "eel").mkdir()
        fails(lambda: pictures.open_images(path, "train"), "'eel'", "train")
        (path / "flat" / "train").mkdir(parents=True)
        fails(lambda: pictures.open_images(path / "flat", "train"), "no class folders")
        good = (path / "train" / "cat" / "cat_0.jpg").read_bytes()
        (path / "train" / "eel").rmdir()
        for i, (content, words) in enumerate(((b"hello", "not an image"), (b"", "not an image"),
                                              (good[:len(good) // 2], "truncated"),
                                              (None, "No such file"))):
            bad = path / "train" / "dog" / f"bad{i}.jpg"
            bad.symlink_to(path / "gone") if content is None else bad.write_bytes(content)
            source = pictures.open_images(path, "train")
            transform = augment.train_transform("torchvision", 8)
            fails(lambda: epoch_of(source, transform), bad, words)
            if content == b"hello":
                fails(lambda: epoch_of(source, transform, workers=2), bad, words)
            bad.unlink()
        huge = path / "train" / "dog" / "huge.png"
        Image.new("L", (64, 64)).save(huge)
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 100):
            fails(lambda: pictures.read_image(huge), huge, "exceeds limit")


def test_images_without_pillow():
    """Random and packed images need none; what does says how to get it."""
    with folder() as path:
        packed = []
        try:
            class_folders(path / "files")
            pictures.pack(path / "files", path / "packed", 16)
            packed = [pictures.open_images(path / "packed", "train")]
        except AssertionError:
            raise
        except Exception as reason:  # without Pillow there is nothing to pack from
            assert "Pillow" in str(reason)
        (path / "files" / "train" / "cat").mkdir(parents=True, exist_ok=True)
        with without_pillow():
            for source in (pictures.dummy_images(9, 16, 2), *packed):
                for recipe in ("torchvision", "timm"):
                    transform = augment.train_transform(recipe, 12)
                    assert len(epoch_of(source, transform, recipe=recipe)) >= 2
                assert len(epoch_of(source, augment.eval_transform(16, 12), train=False)) == 3
            for call in (lambda: pictures.open_images(path / "files", "train"),
                         lambda: augment.train_transform("timm", 8, policy="ta_wide"),
                         lambda: augment.train_transform("timm", 8, policy="rand-m9")):
                print("    " + data_error(call, "pip install pillow"))


def test_images_pack():
    """A packed split is its images, each shrunk and centred; other packings are kept from harm."""
    needs_pillow()
    script = Path(pictures.__file__)

    def run(*words):
        return subprocess.run([sys.executable, script, "pack", *map(str, words)], text=True,
                              capture_output=True)

    with folder() as path:
        files, packed = class_folders(path / "files"), path / "packed"
        first = run(files, packed, "--size", 24, "--workers", 2)
        assert first.returncode == 0 and "9 images of 24x24, 2 classes" in first.stdout, first
        shrink = augment.eval_transform(24, 24, "bicubic")
        for split in ("train", "val"):
            one, two = pictures.open_images(files, split), pictures.open_images(packed, split)
            assert two.kind == "packed" and one.classes == two.classes
            assert (one.labels == two.labels).all()
            for i in range(len(one)):
                assert torch.equal(shrink(one.read(i)), shrink(two.read(i)))
                assert (shrink(one.read(i)).permute(1, 2, 0).numpy() == two.read(i)).all()
        transform = augment.train_transform("torchvision", 16)
        train = pictures.open_images(packed, "train")
        assert same(epoch_of(train, transform), epoch_of(train, transform, workers=2))
        assert len(pickle.dumps(train)) < 2000  # no worker is sent the images
        assert pictures.open_images(packed, "validation", train.classes).classes == train.classes
        data_error(lambda: pictures.open_images(packed, "val", ["cat", "cow"]), "'cow'", "'dog'")

        def refused(call, *words):
            print("    " + data_error(call, *words))

        # again: nothing to do; another size or other images: refused; interrupted: begun anew
        stamp = (packed / "train.images.npy").stat().st_mtime_ns
        pictures.pack(files, packed, 24)
        assert (packed / "train.images.npy").stat().st_mtime_ns == stamp
        refused(lambda: pictures.pack(files, packed, 16), "another packing", "24 pixels")
        refused(lambda: pictures.pack(packed, path / "twice", 16), "packed already")
        refused(lambda: pictures.pack(files, path / "big", 10 ** 7), "GB")
        refused(lambda: pictures.pack(files, script, 24), "cannot write", script)
        whole = (packed / "train.images.npy").read_bytes()
        (packed / "train.packed.json").unlink()
        (packed / "train.images.npy").rename(packed / "train.images.npy.part")
        refused(lambda: pictures.open_images(packed, "train"), "interrupted")
        pictures.pack(files, packed, 24)
        assert (packed / "train.images.npy").read_bytes() == whole
        (packed / "train.images.npy").write_bytes(whole[:-1])
        refused(lambda: pictures.open_images(packed, "train"), "truncated", packed)
        (packed / "train.images.npy").unlink()
        refused(lambda: pictures.open_images(packed, "train"), "missing", "train.images.npy")
        (files / "train" / "dog" / "bad.png").write_text("text")
        bad = run(files, path / "other", "--size", 24)
        assert bad.returncode == 2 and "bad.png" in bad.stderr and bad.stderr.count("\n") == 1, bad
        assert not (path / "other" / "train.packed.json").exists()


def test_images_foreign_packing():
    """Files of the right names that hold other things than data.py writes."""
    with folder() as path:
        about = dict(count=9, size=4, classes=["cat", "dog"])
        pictures.write_packed(path, "train", pictures.dummy_images(9, 4, 2), about, 0)
        labels = np.load(path / "train.labels.npy")
        assert pictures.open_images(path, "train").labels.dtype == labels.dtype == np.int64
        for wrong in (labels / 4, labels.astype(str)):
            np.save(path / "train.labels.npy", wrong)
            data_error(lambda: pictures.open_images(path, "train"), "belong together", "images.py pack")
        (path / "train.packed.json").write_text('{"count": 9, "size": 4, "classes": 2}')
        data_error(lambda: pictures.open_images(path, "train"), "damaged", "images.py pack")


def test_images_rates():
    """The table has a row for each operation; what cannot be measured is refused."""
    needs_pillow()
    with folder() as path:
        class_folders(path)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            pictures.print_rates(path, count=2)
        rows = out.getvalue().splitlines()
        assert "its files" in rows[1] and len(rows) == 8 and "inf" in rows[3], out.getvalue()
        for row in rows[4:]:
            files, packed = map(float, row.split()[-2:])
            assert min(files, packed) > 10, row
        (path / "train.packed.json").write_text("{}")
        data_error(lambda: pictures.print_rates(path), "incomplete")
    image = pictures.noise_image(0, 1.1)
    assert image.shape == (375, 500, 3) and 30 < image.std() < 60


def kill_worker(image, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_worker(image, rng):
    raise RuntimeError("a mistake of the program")


def test_images_signals():
    """A signal to every process is the main one's affair; no worker survives it."""
    source = pictures.dummy_images(8, 4, 2)
    print("    " + data_error(lambda: epoch_of(source, kill_worker, workers=1), "memory"))
    try:  # not the user's mistake: all of it is shown
        epoch_of(source, fail_in_worker, workers=1)
        raise AssertionError("nothing was raised")
    except RuntimeError as error:
        assert "fail_in_worker" in str(error)
    code = ("import images, augment, os, signal, sys, time\n"
            "source = images.dummy_images(4000, 32, 5)\n"
            "loader = images.ImageLoader(source, augment.train_transform('torchvision', 16), 8, seed=0,"
            " train=True, workers=2)\n"
            "stop = []\n"
            "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "try:\n"
            "    for i, _ in enumerate(loader):\n"
            "        if i == 3: print('go', flush=True)\n"
            "        if stop and len(stop) < 20: stop.append(1)\n"
            "        if len(stop) == 20: print('stopped', flush=True); stop.append(1)\n"
            "        time.sleep(0.02)\n"
            "except KeyboardInterrupt:\n"
            "    print('interrupted', flush=True)\n")
    if not hasattr(signal, "sigwaitinfo"):
        skip("this system does not tell who sent a signal")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, cwd=Path(data.__file__).parent,
                           start_new_session=True)
    assert run.stdout.readline() == "go\n", run.communicate()
    os.killpg(run.pid, signal.SIGTERM)
    assert run.stdout.readline() == "stopped\n", run.communicate()  # workers went on
    os.killpg(run.pid, signal.SIGINT)
    out, errors = run.communicate(timeout=30)
    assert out == "interrupted\n" and not errors and run.returncode == 0, (out, errors)
    try:
        os.killpg(run.pid, 0)
        raise AssertionError("a worker is still there")
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    run_tests(globals(), sys.argv[1:])
