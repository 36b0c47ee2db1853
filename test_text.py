"""text.py: characters, words, WikiText-2's sources, the generated text, windows."""
import collections
import gzip
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import download
from test_download import md5, mirror, put, refused  # noqa: F401
from text import (WIKITEXT, all_windows, load_text, num_windows, spell, split_characters, windows,
                  words, write_grammar)


def test_characters(tmp_path):
    """Any Unicode text and back, plain and gzipped; nine tenths for training; one vocabulary."""
    text = "naïve ❤ 字 𠀀 \U0010ffff\n\ttabs, \r\n and 𝒳." * 7 + "\n"
    put(tmp_path, plain=text.encode(), packed=gzip.compress(text.encode()))
    for name in ("plain", "packed"):
        loaded = load_text(tmp_path / name)
        both = torch.cat([loaded.train, loaded.valid])
        assert spell(both.tolist(), loaded) == text
        assert len(loaded.train) == len(text) * 9 // 10 and loaded.unit == "character"
        assert loaded.vocabulary == sorted(set(text))
    short = load_text(tmp_path / "plain", train_size=10, valid_size=3)
    assert short.valid.tolist() == loaded.valid[:3].tolist()
    assert short.train.tolist() == loaded.train[:10].tolist()
    assert short.vocabulary == loaded.vocabulary
    for part in ("train_size", "valid_size"):
        with refused(f"{part} is 999"):
            load_text(tmp_path / "plain", **{part: 999})


def test_byte_order_mark(tmp_path):
    """It is no character, nor part of a word; within a text it is one."""
    put(tmp_path, plain=b"ab\nba" * 9, marked=b"\xef\xbb\xbf" + b"ab\nba" * 9,
        inside=b"ab" + b"\xef\xbb\xbf" + b"ba" * 9)
    plain, marked, inside = (load_text(tmp_path / name) for name in ("plain", "marked", "inside"))
    assert marked.vocabulary == plain.vocabulary and torch.equal(marked.train, plain.train)
    assert "\ufeff" in inside.vocabulary
    put(tmp_path, **{"train.txt": b"\xef\xbb\xbfa b\n", "valid.txt": b"a\n"})
    assert load_text("wikitext2", tmp_path).vocabulary == ["a", "b", "<eos>", "<unk>"]


@pytest.mark.parametrize("count, dtype", [(256, torch.uint8), (257, torch.int16),
                                          (32768, torch.int16), (32769, torch.int32)])
def test_smallest_type(tmp_path, count, dtype):
    """Tokens are stored in it, over several pieces of text; batches are int64."""
    text = "".join(chr(0x10000 + i) for i in range(count)) * 2
    loaded = split_characters(text, "here", piece=1000)
    assert loaded.train.dtype == loaded.valid.dtype == dtype
    both = torch.cat([loaded.train, loaded.valid]).long()
    assert torch.equal(both, torch.arange(count).repeat(2)) and len(loaded.vocabulary) == count
    for x, y in (next(windows(loaded.train, 8, 2, seed=0, epoch=0)),
                 next(all_windows(loaded.valid, 8, 2))):
        assert x.dtype == y.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    *_, (x, _) = all_windows(loaded.valid[:10], 8, 2)       # the rest
    assert x.dtype == torch.int64


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


def test_fingerprint(tmp_path):
    """Of the tokens that are used and what they stand for."""
    put(tmp_path, a=b"abcb" * 9, b=b"abcd" * 9, c=b"xyzy" * 9, d=b"abcb" * 9)
    prints = [load_text(tmp_path / name).fingerprint for name in "abcd"]
    prints += [load_text(tmp_path / "a", **{f"{part}_size": 2}).fingerprint
               for part in ("train", "valid")]
    assert prints[0] == prints[3] and len(set(prints)) == 5


def test_bad_texts(tmp_path, monkeypatch):
    whole = gzip.compress(b"naive text" * 9)
    put(tmp_path, latin="für".encode("latin1"), cut=whole[:20], flat=b"aaaa", empty=b"",
        flipped=whole[:10] + bytes(255 - b for b in whole[10:18]) + whole[18:])
    for name in ("latin", "cut", "flat", "empty", "flipped"):
        with refused(tmp_path / name, "another file"):
            load_text(tmp_path / name)
    with refused("none", "grammar"):
        load_text(tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with refused(tmp_path / "latin"):
        load_text("~/latin")
    with refused("~who?/text", "in full"):
        load_text("~who?/text")


def test_words(tmp_path):
    """The published convention: split at blanks, <eos> for every line; unknown words <unk>."""
    train = " \n = A Title = \n \n a b <unk> a , c \n"
    valid = " a d \n\n c \n"
    put(tmp_path / "wikitext-2", **{"train.txt": train.encode(), "valid.txt": valid.encode()})
    for place in (tmp_path, tmp_path / "wikitext-2"):
        text = load_text("wikitext2", place, download=False)
        assert "not as published" in text.source and text.unit == "word"
    want = [word for line in train.split("\n")[:-1] for word in line.split() + ["<eos>"]]
    assert [text.vocabulary[i] for i in text.train] == want
    counts = collections.Counter(want)
    assert [counts[w] for w in text.vocabulary] == sorted(counts.values(), reverse=True)
    assert spell(text.valid.tolist(), text) == "a <unk>\n\nc\n"
    assert spell(text.train.tolist(), text) == "\n= A Title =\n\na b <unk> a , c\n"
    assert words(spell(text.train.tolist(), text)) == want, "what is spelled reads the same"
    other = load_text("wikitext2", tmp_path, "valid.txt", "train.txt", download=False)
    assert "<unk>" in other.vocabulary and len(other.valid) == len(text.train)
    with refused("mine.txt", "--valid_file"):
        load_text("wikitext2", tmp_path, "train.txt", "mine.txt")
    with refused("~who?/x", "in full"):
        load_text("wikitext2", "~who?/x")


FILES = {name: f" {name} words \n".encode() for name in WIKITEXT}


@pytest.fixture
def archive(mirror, monkeypatch):  # noqa: F811
    """A small WikiText-2 in both forms, on the mirror; the bytes of its zip file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name, blob in FILES.items():
            zipped.writestr(f"wikitext-2/wiki.{name[:-4]}.tokens", blob)
            git = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            monkeypatch.setitem(download.FILES, name, (None, "git:" + git))
    blob = packed.getvalue()
    monkeypatch.setitem(download.FILES, "wikitext-2-v1.zip", (None, md5(blob)))
    mirror.blobs.update({**FILES, "wikitext-2-v1.zip": blob})

    def serve(single, whole):
        monkeypatch.setitem(download.MIRRORS, "wikitext2",
                            [f"{mirror.address}/{whole}/wikitext-2-v1.zip"])
        for name in FILES:
            monkeypatch.setitem(download.MIRRORS, f"wikitext2/{name}",
                                [f"{mirror.address}/{single}/{name}"])
    return serve, blob


@pytest.mark.parametrize("single, whole, found", [
    ("good", "missing", "train.txt"), ("missing", "good", "v1.zip"), ("wrong", "good", "v1.zip")])
def test_wikitext_sources(archive, tmp_path, single, whole, found):
    """The archive, and downloads of either form, verified; the second finds the first's files."""
    serve, blob = archive
    serve(single, whole)
    for attempt in range(2):
        text = load_text("wikitext2", tmp_path, download=attempt == 0)
        assert found in text.source and "verified" in text.source
        assert spell(text.train.tolist(), text) == "train.txt words\n"
    if found == "v1.zip":
        put(tmp_path / "wikitext-2", **{"valid.txt": b"own\n"})  # comes before the archive's
        text = load_text("wikitext2", tmp_path)
        assert "not as published" in text.source and "v1.zip" in text.source
        assert spell(text.valid.tolist(), text) == "<unk>\n"
        put(tmp_path, **{"wikitext-2-v1.zip": blob[:-1]})
        with refused("damaged", "v1.zip"):
            load_text("wikitext2", tmp_path)


def test_wikitext_nowhere(archive, tmp_path):
    archive[0]("missing", "missing")
    with refused("404", "by hand", "wikitext-2-v1.zip", "--dataset grammar") as caught:
        load_text("wikitext2", tmp_path)
    assert str(caught.value).count("by hand") == 1 and str(caught.value).count("404") == 2


def test_grammar():
    """The same on all machines; verbs agree with their subject, and each paragraph has one hero."""
    text = write_grammar()
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "09f587abeb53b815099b8e9bdb07b3596d77424684e8c07790e745da0b5487f9")

    def noun_phrase(words):          # drops one from the front: is it plural?
        first = words.pop(0)
        if first[0].isupper():
            return False
        assert first in ("a", "some")
        while words.pop(0)[-1] == "l":
            pass
        return first == "some"

    across, heroes = 0, set()
    for line in text.splitlines():
        names = {word.strip(".") for word in line.split() if word[0].isupper()}
        assert len(names) <= 1, names
        heroes |= names
        for sentence in line.rstrip(".").split(". "):
            rest = sentence.split()
            plural = noun_phrase(rest)
            if rest[0] == "that":
                assert rest[1][-1] == "st"[plural]
                del rest[:2]
                across += noun_phrase(rest) != plural
            assert rest[0][-1] == "st"[plural], sentence
    assert len(heroes) > 900 and across > 800


def test_windows():
    """Training windows are pieces of the text, each token at most once; two seeds differ."""
    tokens = torch.arange(103)
    batches = list(windows(tokens, 10, 3, seed=0, epoch=0))
    assert len(batches) == num_windows(tokens, 10) // 3 == 3
    assert [len(x) for x, _ in windows(tokens, 10, 4, seed=0, epoch=0)] == [4, 4]  # of 9 windows
    starts = torch.cat([x[:, 0] for x, _ in batches])
    for x, y in batches:
        assert torch.equal(x, x[:, :1] + torch.arange(10)) and torch.equal(y, x + 1)
    assert len(set(starts.tolist())) == 9 and len(set((starts % 10).tolist())) == 1
    repeated, *others = (torch.cat([x for x, _ in windows(tokens, 10, 3, seed=s, epoch=e)])
                         for s, e in ((0, 0), (0, 1), (1, 0)))
    assert torch.equal(repeated, torch.cat([x for x, _ in batches]))
    assert not any(torch.equal(repeated, other) for other in others)
    offsets = {int(x[0, 0]) % 10 for e in range(60)
               for x, _ in windows(tokens, 10, 3, seed=0, epoch=e)}
    assert offsets == set(range(10)), "every offset comes"


@pytest.mark.parametrize("length", [2, 10, 11, 12, 31, 45])
def test_all_windows(length):
    """Each token but the first once, in order."""
    x, y = zip(*all_windows(torch.arange(length), 10, 2))
    assert torch.cat([part.flatten() for part in y]).tolist() == list(range(1, length))
    assert all(torch.equal(b, a + 1) for a, b in zip(x, y))


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
