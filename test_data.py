"""data.py: every file form, damage, downloads from a server on this machine, and batches.

    python test_data.py          # a quarter of a minute; no network, no real data set
"""
import contextlib
import gzip
import hashlib
import http.server
import io
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
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import data
from test_math import close, run_tests

# A shell that starts this in the background lets it, and so its children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------- helpers: a tiny CIFAR

def data_error(call, *words):
    """The message of the DataError that `call` raises, which must hold all the words."""
    try:
        call()
    except data.DataError as error:
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
    with mock.patch.dict(data.FILES, files), mock.patch.dict(
            data.RELEASES, cifar10=releases), mock.patch.dict(data.MIRRORS, cifar10=mirrors):
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


def download(*how, part=None, file="tiny.bin.gz", words=()):
    """Load a tiny CIFAR through mirrors that behave as `how` says.

    part: bytes of an earlier attempt. words: expect a DataError that holds them.
    Returns the (how, first byte) of the requests and what is left of the .part file.
    """
    with folder() as path, tiny_cifar() as blobs, mirror(blobs) as address:
        data.MIRRORS["cifar10"] = [f"{address}/{h}/{file}" for h in how]
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
    got = data.augment(images, torch.Generator().manual_seed(5), pad=3)
    top, left, mirrored = (torch.randint(n, (40, 1), generator=state) for n in (7, 7, 2))
    for i in range(40):
        want = F.pad(images[i], (3, 3, 3, 3))[:, top[i]:top[i] + 32, left[i]:left[i] + 28]
        assert torch.equal(got[i], want.flip(2) if mirrored[i] else want)
    assert {0, 6} <= set(top.flatten().tolist()) and 5 < mirrored.sum() < 35
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    x = data.normalize(images, mean, std)
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
        data.FILES["tiny.bin.gz"] = (len(short), md5(short))
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
    assert download("good") == ([("good", 0)], None)
    assert download("good", file="tiny.py.gz")[1] is None
    assert download("missing", "page", "good")[0] == [("missing", 0), ("page", 0), ("good", 0)]

    def half(blob):
        return blob[:5000]

    assert download("good", part=half)[0] == [("good", 5000)]
    assert download("norange", part=half)[0] == [("norange", 5000)]
    assert download("good", part=lambda blob: blob)[0][0][0] == "good"  # only the rename was left
    # a break is mended at the same mirror; bytes of another file are dropped
    requests = download("breaks")[0]
    assert len(requests) == 2 and requests[1][1] > 5000
    assert download("good", part=lambda blob: b"x" * 5000)[0] == [("good", 5000), ("good", 0)]
    assert download("good", part=lambda blob: blob + b"x")[0][-1] == ("good", 0)
    assert download("wrong", "good")[0] == [("wrong", 0), ("good", 0)]
    assert download("wrong", "good", part=half)[0] == [("wrong", 5000), ("wrong", 0), ("good", 0)]
    # none delivers: one message, and what had arrived stays
    words = ("cifar10 could not be downloaded", "404", "offers 19 bytes", "/page/tiny.bin.gz",
             "tiny.bin.gz or tiny.py.gz", "by hand", "--dataset shapes")
    requests, left = download("missing", "page", part=half, words=words)
    assert len(left) == 5000
    assert download("wrong", words=["wrong checksum"])[1] is None


def test_data_download_fails_soon():
    """Nobody there, a name that does not resolve, a mirror that falls silent."""
    start = time.time()
    with folder() as path, tiny_cifar() as blobs, mirror(blobs) as address, mock.patch.object(
            data, "TIMEOUT", 0.3):
        data.MIRRORS["cifar10"] = [f"http://127.0.0.1:1/{name}" for name in data.FILES][-2:] + [
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
    with folder() as path, mock.patch.dict(data.FILES, files), mirror(blobs) as address, \
            mock.patch.dict(data.MIRRORS, fashion_mnist=[f"{address}/missing/",
                                                         f"{address}/good/"]):
        data_error(lambda: data.load("fashion_mnist", path, download=False), "lacks", *data.FASHION)
        for place in (path, path / "fashion-mnist"):
            got = data.load("fashion_mnist", place)
            assert torch.equal(got.train_images, torch.from_numpy(images.astype(np.uint8))[:, None])
            assert got.test_labels.tolist() == [4, 5, 6] and got.test_images.shape == (3, 1, 28, 28)
        assert len(Mirror.requests) == 8
        put(path / "fashion-mnist", **{data.FASHION[1]: blobs[data.FASHION[3]]})
        data_error(lambda: data.load("fashion_mnist", path), data.FASHION[1], "Remove it")
        data.FILES[data.FASHION[1]] = files[data.FASHION[3]]
        data_error(lambda: data.load("fashion_mnist", path), "does not fit")


def test_data_command_line():
    """`python data.py`: exit status 2 with a sentence; Ctrl-C keeps what has arrived."""
    script = Path(data.__file__)
    code = ("import sys, data; data.MIRRORS['cifar100'] = [sys.argv.pop()]; "
            "data.FILES['a'] = (None, 'md5:0'); sys.exit(data.main())")
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


if __name__ == "__main__":
    run_tests(globals(), sys.argv[1:])
