"""text.py: characters, words, WikiText-2's sources, the generated text, windows."""
import collections
import gzip
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import download
from test_download import md5, mirror, put, refused  # noqa: F401
from text import (WIKITEXT, Text, all_windows, load_text, num_windows, spell, split_characters,
                  windows, words)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_characters(tmp_path, pack):
    """Any Unicode text and back; nine tenths for training; one vocabulary."""
    text = "naïve ❤ 字 𠀀 \U0010ffff\n\ttabs, \r\n and 𝒳." * 7 + "\n"
    loaded = load_text(put(tmp_path, text=pack(text.encode())) / "text")
    both = torch.cat([loaded.train, loaded.valid])
    assert spell(both.tolist(), loaded) == text and loaded.unit == "character"
    assert len(loaded.train) == len(text) * 9 // 10 and loaded.vocabulary == sorted(set(text))
    short = load_text(tmp_path / "text", train_size=10, valid_size=len(loaded.valid))
    assert torch.equal(short.train, both[:10]) and torch.equal(short.valid, loaded.valid)
    assert short.vocabulary == loaded.vocabulary
    for part in ("train_size", "valid_size"):
        with refused(f"{part} is 999"):
            load_text(tmp_path / "text", **{part: 999})


def test_byte_order_mark(tmp_path):
    """It is no character, nor part of a word; within a text it is one."""
    mark = b"\xef\xbb\xbf"
    put(tmp_path, plain=b"ab\nba" * 9, marked=mark + b"ab\nba" * 9, inside=b"ab" + mark + b"ba" * 9,
        **{"train.txt": mark + b"a b\n", "valid.txt": b"a\n"})
    plain, marked, inside = (load_text(tmp_path / name) for name in ("plain", "marked", "inside"))
    assert marked.vocabulary == plain.vocabulary and torch.equal(marked.train, plain.train)
    assert "\ufeff" in inside.vocabulary
    assert load_text("wikitext2", tmp_path).vocabulary == ["a", "b", "<eos>", "<unk>"]


@pytest.mark.parametrize("count, dtype", [(256, torch.uint8), (257, torch.int16),
                                          (32768, torch.int16), (32769, torch.int32)])
def test_smallest_type(count, dtype):
    """Tokens are stored in it, over several pieces of text; batches are int64."""
    text = "".join(chr(0x10000 + i) for i in range(count)) * 2
    loaded = split_characters(text, "here", piece=1000)
    assert loaded.train.dtype == loaded.valid.dtype == dtype
    both = torch.cat([loaded.train, loaded.valid]).long()
    assert torch.equal(both, torch.arange(count).repeat(2)) and len(loaded.vocabulary) == count
    for x, y in [*windows(loaded.train, 8, 2, seed=0, epoch=0), *all_windows(loaded.valid, 8, 2)]:
        assert x.dtype == y.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does it")
def test_memory_per_character(tmp_path):
    put(tmp_path, text=b"To be, or not to be, that is the question;\n" * 400_000)
    code = ("import resource, sys, text\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak(); loaded = text.load_text(sys.argv[1])\n"
            "print((peak() - before) / (len(loaded.train) + len(loaded.valid)))")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "text"], capture_output=True,
                         text=True, cwd=Path(__file__).parent)
    assert float(run.stdout) < 6, run.stderr


def test_fingerprint():
    """Of the tokens that are used and what they stand for, not of where they were read."""
    a, b = torch.tensor([0, 1]), torch.tensor([1, 1])
    texts = [Text(a, b, ["x", "y"], "word", source) for source in "pq"]
    texts += [Text(b, b, *texts[0][2:]), Text(a, a, *texts[0][2:]), Text(a, b, ["x", "z"], "", "")]
    prints = [text.fingerprint for text in texts]
    assert prints[0] == prints[1] and len(set(prints)) == 4


WHOLE = gzip.compress(b"naive text" * 9, mtime=0)


@pytest.mark.parametrize("content", ["für".encode("latin1"), b"aaaa", b"", WHOLE[:20],
                                     WHOLE[:10] + bytes(8) + WHOLE[18:]],
                         ids=("latin1", "short", "empty", "cut", "damaged"))
def test_bad_texts(tmp_path, monkeypatch, content):
    put(tmp_path, bad=content)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with refused(tmp_path / "bad", "another file"):
        load_text("~/bad")


@pytest.mark.parametrize("name, how, message", [
    ("none", {}, ["none", "grammar"]), ("~who?/text", {}, ["~who?/text", "in full"]),
    ("wikitext2", {"data_dir": "~who?/x"}, ["~who?/x", "in full"]),
    ("wikitext2", {"valid_file": "mine.txt"}, ["mine.txt", "--valid_file", "by hand"])])
def test_no_texts(tmp_path, name, how, message):
    with refused(*message):
        load_text(tmp_path / name if name == "none" else name, **{"data_dir": tmp_path, **how})


def test_words(tmp_path):
    """The published convention: split at blanks, <eos> for every line; unknown words <unk>."""
    train = " \n = A Title = \n \n a b <unk> a , c \n"
    valid = " a d \n\n c \n"
    put(tmp_path / "wikitext-2", **{"train.txt": train.encode(), "valid.txt": valid.encode()})
    for place in (tmp_path, tmp_path / "wikitext-2"):
        text = load_text("wikitext2", place)
        assert "not as published" in text.source and text.unit == "word"
    want = [word for line in train.split("\n")[:-1] for word in line.split() + ["<eos>"]]
    assert [text.vocabulary[i] for i in text.train] == want
    counts = collections.Counter(want)
    assert [counts[w] for w in text.vocabulary] == sorted(counts.values(), reverse=True)
    assert spell(text.valid.tolist(), text) == "a <unk>\n\nc\n"
    assert spell(text.train.tolist(), text) == "\n= A Title =\n\na b <unk> a , c\n"
    assert words(spell(text.train.tolist(), text)) == want, "what is spelled reads the same"
    other = load_text("wikitext2", tmp_path, "valid.txt", "train.txt")
    assert "<unk>" in other.vocabulary and len(other.valid) == len(text.train)


FILES = {name: f" {name} words \n".encode() for name in WIKITEXT}


@pytest.fixture
def serve(mirror, monkeypatch):  # noqa: F811
    """serve(HOW files are served, HOW the archive): a small WikiText-2 in both forms."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name, blob in FILES.items():
            zipped.writestr(f"wikitext-2/wiki.{name[:-4]}.tokens", blob)
            git = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            monkeypatch.setitem(download.FILES, name, (None, "git:" + git))
    archive = "wikitext-2-v1.zip"
    monkeypatch.setitem(download.FILES, archive, (None, md5(packed.getvalue())))
    mirror.blobs.update(FILES | {archive: packed.getvalue()})

    def start(single, whole):
        places = {"wikitext2": (whole, archive)}
        places |= {f"wikitext2/{name}": (single, name) for name in FILES}
        for key, (how, name) in places.items():
            monkeypatch.setitem(download.MIRRORS, key, [f"{mirror.address}/{how}/{name}"])
    return start


@pytest.mark.parametrize("single, whole, found", [
    ("good", "missing", "train.txt"), ("missing", "good", "v1.zip"), ("wrong", "good", "v1.zip")])
def test_wikitext_sources(serve, tmp_path, single, whole, found):
    """The archive, and downloads of either form, verified; the second finds the first's files."""
    serve(single, whole)
    for _ in range(2):
        text = load_text("wikitext2", tmp_path)
        serve("missing", "missing")
        assert found in text.source and "verified" in text.source
        assert spell(text.train.tolist(), text) == "train.txt words\n"


def test_wikitext_archive(serve, tmp_path):
    """The user's own files come before it; it has no others than the published; damage is seen."""
    serve("missing", "good")
    put(tmp_path / "wikitext-2", **{"valid.txt": b"own\n"})
    text = load_text("wikitext2", tmp_path)
    assert "not as published" in text.source and "v1.zip" in text.source
    assert spell(text.valid.tolist(), text) == "<unk>\n"
    with refused("does not contain", "mine", "train.txt, valid.txt, test.txt"):
        load_text("wikitext2", tmp_path, "mine.txt")
    blob = (tmp_path / "wikitext-2-v1.zip").read_bytes()
    put(tmp_path, **{"wikitext-2-v1.zip": blob[:-1]})
    with refused("damaged", "v1.zip"):
        load_text("wikitext2", tmp_path)


def test_wikitext_nowhere(serve, tmp_path):
    serve("missing", "missing")
    with refused("404", "by hand", "wikitext-2-v1.zip", "--dataset grammar") as caught:
        load_text("wikitext2", tmp_path)
    assert str(caught.value).count("by hand") == 1 and str(caught.value).count("404") == 2


def test_grammar():
    """The same on all machines; verbs agree with their subject, and each paragraph has one hero."""
    loaded = load_text("grammar")
    text = spell([*loaded.train, *loaded.valid], loaded)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "09f587abeb53b815099b8e9bdb07b3596d77424684e8c07790e745da0b5487f9")
    one, many = r"(?:[A-Z]\w+|a (?:\w+l )?\w+[aeiou])", r"some (?:\w+l )?\w+n"
    phrase = f"(?:{one}|{many})"
    grammar = re.compile(rf"{one}(?: that \w+s {phrase})? \w+s {phrase}|"
                         rf"{many}(?: that \w+t {phrase})? \w+t {phrase}")
    heroes = [set(re.findall(r"[A-Z]\w+", line)) for line in text.splitlines()]
    assert max(map(len, heroes)) == 1 and len(set.union(*heroes)) > 900
    assert all(grammar.fullmatch(sentence) for line in text.splitlines()
               for sentence in line.removesuffix(".").split(". "))


def test_windows():
    """Training windows are pieces of the text, each token at most once, at every offset."""
    def begin(epoch=0, seed=0):
        """Where the windows of an epoch begin."""
        batches = list(windows(torch.arange(103), 10, 3, seed=seed, epoch=epoch))
        assert len(batches) == num_windows(torch.arange(103), 10) // 3 == 3
        for x, y in batches:
            assert torch.equal(x, x[:, :1] + torch.arange(10)) and torch.equal(y, x + 1)
        return torch.cat([x[:, 0] for x, _ in batches]).tolist()
    assert begin() == begin() and len({tuple(begin()), tuple(begin(1)), tuple(begin(0, 1))}) == 3
    offsets = set()
    for epoch in range(60):
        starts = begin(epoch)
        assert len(set(starts)) == 9 and starts != sorted(starts)
        offset, = {start % 10 for start in starts}
        offsets.add(offset)
    assert offsets == set(range(10))
    assert [len(x) for x, _ in windows(torch.arange(103), 10, 4, seed=0, epoch=0)] == [4, 4]


@pytest.mark.parametrize("length, shapes", [
    (1, []), (2, [(1, 1)]), (10, [(1, 9)]), (11, [(1, 10)]), (12, [(1, 10), (1, 1)]),
    (31, [(2, 10), (1, 10)]), (45, [(2, 10), (2, 10), (1, 4)])])
def test_all_windows(length, shapes):
    """Each token but the first once, in order."""
    batches = list(all_windows(torch.arange(length), 10, 2))
    assert [x.shape for x, _ in batches] == shapes
    assert all(torch.equal(y, x + 1) for x, y in batches)
    assert [token for _, y in batches for token in y.flatten().tolist()] == [*range(1, length)]
