"""download.py: mirrors good and bad, resumed transfers, checksums; a server on this machine.

What test_data.py and test_text.py need too is here: a mirror, files on disk, a DataError's words.
"""
import contextlib
import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import download
from download import DataError

# A shell that starts this in the background lets it, and so its children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def refused(*words):
    """A DataError is raised, and its message holds all the words."""
    with pytest.raises(DataError) as caught:
        yield caught
    for word in words:
        assert str(word) in str(caught.value)


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def md5(blob):
    return "md5:" + hashlib.md5(blob).hexdigest()


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves /HOW/NAME from the server's `blobs`, well or badly according to HOW."""

    def do_GET(self):
        how, name = self.path.strip("/").split("/")
        start = int(re.sub(r"\D", "", self.headers["Range"] or "0"))
        self.server.requests.append((how, start))
        blob = self.server.blobs[name]
        if how == "missing":
            return self.send_error(404)
        while how == "drips-headers" and not self.server.stop.wait(0.05):
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: " if start == 0 else b"x")
            start = 1
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
        if how != "endless":
            self.send_header("Content-Length", str(len(blob) - start))
        self.end_headers()
        rest = blob[start:]
        if how == "silent":
            return self.server.stop.wait(20)
        if how == "breaks" and start == 0:
            rest = rest[:len(rest) // 2]
        if how == "slow":
            self.wfile.write(rest[:1000])
            self.server.stop.wait(20)
        if how == "drips":
            for i in range(len(rest)):
                self.wfile.write(rest[i:i + 1])
                self.server.stop.wait(0.05)
        self.wfile.write(rest)
        for _ in range(10_000 if how == "endless" else 0):    # enough, and no disk is filled
            if self.server.stop.is_set():
                break
            self.wfile.write(rest)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Mirror)
        self.blobs, self.requests, self.stop = {}, [], threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the tests


@pytest.fixture
def mirror(monkeypatch):
    """A running Server; an address no proxy is asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


BLOB = bytes(range(256)) * 40


@pytest.fixture
def fetch(mirror, monkeypatch, tmp_path):
    """A function that fetches BLOB as `file` through mirrors that behave as named.

    It returns the (how, first byte) of the requests and what is left of the .part file.
    """
    monkeypatch.setitem(download.FILES, "file", (len(BLOB), md5(BLOB)))
    mirror.blobs["file"] = BLOB

    def run(*how, part=None, words=()):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        put(folder, **({} if part is None else {"file.part": part}))
        mirror.requests.clear()
        urls = [f"{mirror.address}/{h}/file" for h in how]
        with refused("no luck", *words, "by hand") if words else contextlib.nullcontext():
            download.fetch_any(urls, folder, "no luck", "by hand")
            assert (folder / "file").read_bytes() == BLOB
        assert (folder / "file").exists() == (not words)
        left = folder / "file.part"
        return list(mirror.requests), left.read_bytes() if left.exists() else None
    return run


@pytest.mark.parametrize("how, part, requests", [
    (["good"], None, [("good", 0)]),
    (["missing", "page", "good"], None, [("missing", 0), ("page", 0), ("good", 0)]),
    (["good"], BLOB[:5000], [("good", 5000)]),
    (["norange"], BLOB[:5000], [("norange", 5000)]),
    (["good"], BLOB, [("good", len(BLOB))]),                       # only the rename was left
    (["breaks"], None, [("breaks", 0), ("breaks", len(BLOB) // 2)]),
    (["good"], b"x" * 5000, [("good", 5000), ("good", 0)]),        # bytes of another file: dropped
    (["good"], BLOB + b"x", [("good", len(BLOB) + 1), ("good", 0)]),
    (["wrong", "good"], None, [("wrong", 0), ("good", 0)]),
    (["wrong", "good"], BLOB[:5000], [("wrong", 5000), ("wrong", 0), ("good", 0)]),
])
def test_mirrors(fetch, how, part, requests):
    """Mirrors in turn, resuming, verifying; a break is mended at the same mirror."""
    assert fetch(*how, part=part) == (requests, None)


def test_no_mirror_delivers(fetch):
    """One message that names each, and what had arrived stays; what was wrong does not."""
    words = ("404", "offers 19 bytes", "/missing/file", "/page/file")
    assert fetch("missing", "page", part=BLOB[:5000], words=words)[1] == BLOB[:5000]
    assert fetch("wrong", words=["wrong checksum"])[1] is None


def test_no_answer(mirror, monkeypatch, tmp_path):
    """Nobody there, a name that does not resolve, a mirror that falls silent."""
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setitem(download.FILES, "file", (len(BLOB), md5(BLOB)))
    mirror.blobs["file"] = BLOB
    urls = ["http://127.0.0.1:1/file", "http://name.invalid/file", f"{mirror.address}/slow/file"]
    with refused("refused", "name.invalid", "no answer"):
        download.fetch_any(urls, tmp_path, "no luck", "by hand")
    assert BLOB.startswith((tmp_path / "file.part").read_bytes())


@pytest.mark.parametrize("size", [len(BLOB), None])
def test_endless_answer(fetch, monkeypatch, size):
    """Given up at the known size, or at a limit; asked once; only bytes of before are left."""
    monkeypatch.setitem(download.FILES, "file", (size, md5(BLOB)))
    monkeypatch.setattr(download, "MOST", 20_000)
    words = ["more than the", "/endless/file"]
    assert fetch("endless", words=words) == ([("endless", 0)], None)
    assert fetch("endless", part=BLOB[:5000], words=words) == ([("endless", 5000)], BLOB[:5000])
    assert fetch("endless", "good") == ([("endless", 0), ("good", 0)], None)


def test_too_much_is_offered(fetch, monkeypatch):
    """Where the size is not known there is a limit; nothing is then transferred."""
    monkeypatch.setitem(download.FILES, "file", (None, md5(BLOB)))
    assert fetch("good") == ([("good", 0)], None)
    monkeypatch.setattr(download, "MOST", len(BLOB) - 1)
    assert fetch("good", words=[f"offers {len(BLOB)} bytes"]) == ([("good", 0)], None)


def test_dripping_mirror(fetch, monkeypatch):
    """Given up after a time, although every byte of it comes within the timeout."""
    monkeypatch.setattr(download, "PATIENCE", 0.3)
    (drips, good), left = fetch("drips", "good")
    assert drips == ("drips", 0) and good[0] == "good" and 0 < good[1] < 100 and left is None
    assert fetch("drips-headers", "good") == ([("drips-headers", 0), ("good", 0)], None)
    assert fetch("drips-headers", words=["no answer"]) == ([("drips-headers", 0)], None)


@pytest.mark.parametrize("name", [".lock", "file.part"])
@pytest.mark.parametrize("plant", [os.symlink, os.link, lambda _, path: os.mkfifo(path)],
                         ids=["symlink", "hard-link", "fifo"])
def test_planted_files(mirror, monkeypatch, tmp_path, name, plant):
    """What somebody left under our names in a shared folder does not lead us elsewhere."""
    monkeypatch.setitem(download.FILES, "file", (len(BLOB), md5(BLOB)))
    mirror.blobs["file"] = BLOB
    put(tmp_path, precious=b"precious")
    put(tmp_path / "data")
    plant(tmp_path / "precious", tmp_path / "data" / name)
    with pytest.raises(OSError) as caught, download.one_at_a_time(tmp_path / "data"):
        download.fetch_any([f"{mirror.address}/good/file"], tmp_path / "data", "no luck", "")
    assert caught.value.filename == str(tmp_path / "data" / name)
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_nothing_is_left(mirror, monkeypatch, tmp_path):
    """Neither the lock, nor an empty file, nor a folder that was made in vain."""
    monkeypatch.setitem(download.FILES, "file", (len(BLOB), md5(BLOB)))
    mirror.blobs["file"] = BLOB
    monkeypatch.setattr(download, "TIMEOUT", 0.2)

    def fetch(how, folder):
        with download.one_at_a_time(folder):
            download.fetch_any([f"{mirror.address}/{how}/file"], folder, "no luck", "")
    for how in ("missing", "silent", "wrong"):
        with refused("no luck"):
            fetch(how, tmp_path / "new" / "below")
        assert os.listdir(tmp_path) == []
    old = put(tmp_path / "old")
    with refused("no luck"):
        fetch("missing", old)
    assert os.listdir(old) == []
    fetch("good", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["file"]


def test_one_at_a_time(tmp_path, capsys):
    """Also while the others remove the lock and the folder that it lies in."""
    inside, worst = [], []

    def work():
        for _ in range(20):
            with download.one_at_a_time(tmp_path / "new" / "er"):
                inside.append(1)
                time.sleep(0.0005)
                worst.append(len(inside))
                inside.pop()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worst) == 80 and max(worst) == 1 and not list(tmp_path.glob("new/er/*"))


def test_folders_that_cannot_be_made(tmp_path):
    put(tmp_path, file=b"")
    (tmp_path / "link").symlink_to("nowhere")
    for place in (tmp_path / "file", tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(OSError), download.one_at_a_time(place):
            pass


def test_git_checksum(tmp_path):
    put(tmp_path, empty=b"")
    right = "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert download.matches(tmp_path / "empty", right)
    assert not download.matches(put(tmp_path, empty=b"x") / "empty", right)


def test_ctrl_c_keeps_what_arrived(mirror, tmp_path):
    """`python data.py`: exit status 130 after Ctrl-C, and the download can go on."""
    code = ("import sys, data, download; download.MIRRORS['cifar100'] = [sys.argv.pop()]; "
            "download.FILES['a'] = (None, 'md5:0'); sys.exit(data.main())")
    mirror.blobs["a"] = bytes(5000)
    run = subprocess.Popen([sys.executable, "-c", code, "cifar100", "--data-dir", tmp_path,
                            f"{mirror.address}/slow/a"], stderr=subprocess.PIPE, text=True,
                           cwd=Path(__file__).parent)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a.part").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
        errors = run.communicate(timeout=30)[1]
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert (tmp_path / "a.part").exists()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
