"""images.py: class folders, batches in worker processes, packed arrays, signals."""
import errno
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import augment
import images
from augment import eval_transform, train_transform
from images import DummyImages, FewerImages, ImageLoader, open_images, training_order
from test_augment import Image, needs_pillow, smooth_image
from test_download import refused


@pytest.fixture
def folders(tmp_path):
    """{train,val}/{cat,dog}/<class>_<i>.jpg: 5 and 4, 2 and 2 images of several sizes."""
    pytest.importorskip("PIL")
    root = tmp_path / "set"
    for place, count in (("train/cat", 5), ("train/dog", 4), ("val/cat", 2), ("val/dog", 2)):
        (root / place).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(smooth_image(i, 40 + 5 * i, 61 - 3 * i))
            image.save(root / place / f"{place[-3:]}_{i}.jpg")
    return root


def epoch_of(source, transform, batch_size=4, epoch=0, skip=0, **how):
    """All batches of one epoch."""
    with warnings.catch_warnings():  # torch finds three workers many for a small machine
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = ImageLoader(source, transform, batch_size, **{"seed": 3, "train": True, **how})
        loader.set_epoch(epoch, skip)
        return list(loader)


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for x, y in zip(some, others) for a, b in zip(x, y))


# ---------------------------------------------------------------- order and batches

@pytest.mark.parametrize("count, world, repeats", [
    (300, 4, 3), (1000, 3, 2), (256, 8, 4), (600, 5, 2.5)])
def test_order_of_repeats(count, world, repeats):
    """Step by step: repeat, pad, take every world-th, cut; what DeiT's own sampler gives."""
    perm = torch.randperm(count, generator=torch.Generator().manual_seed(7 + 2)).tolist()
    entries = [perm[int(i // repeats)] for i in range(int(count * repeats))]
    entries += entries[:-len(entries) % world]
    for rank in range(world):
        want = entries[rank::world][:count // 256 * 256 // world]
        assert training_order(count, 7, 2, rank, world, repeats)[0].tolist() == want
    published = [158, 476, 186, 123, 165, 223, 262, 214]
    assert training_order(512, 0, 1, 3, 4, 3)[0][:8].tolist() == published


def test_order_of_plain_shuffling():
    indices, positions = zip(*(training_order(10, 0, 5, rank, 4) for rank in range(4)))
    assert list(map(len, indices)) == [3] * 4 and set(np.concatenate(indices)) == set(range(10))
    assert sorted(np.concatenate(positions)) == list(range(12))     # two images come twice


def lengths(count, size, **how):
    """How many images each batch of an epoch has."""
    loader = ImageLoader(DummyImages(count, 4, 3), None, size, seed=0, **{"train": True, **how})
    assert len(loader.plan) == len(loader)
    return [len(indices) for indices, _, _ in loader.plan]


def test_batch_sizes():
    assert lengths(10, 4) == [4, 4, 2] and lengths(10, 4, recipe="timm") == [4, 4]
    assert lengths(256, 50, world=4, repeats=3) == [50, 14]
    assert sum(lengths(300, 25, world=1, repeats=3)) == 300  # alone: plain, as published
    shards = [lengths(3, 1, train=False, rank=rank, world=4) for rank in range(4)]
    assert shards == [[1], [1], [1], []] and lengths(10, 4, train=False, recipe="timm")[2] == 2
    for count in range(16, 50):  # steps of 16 images, however they are divided
        for world, size, accum in ((1, 16, 1), (1, 8, 2), (2, 8, 1), (2, 4, 2), (4, 4, 1)):
            batches = lengths(count, size, world=world, accum=accum, recipe="timm")
            assert batches == [size] * (count // 16 * accum)
    with refused("255", "blocks of 256"):
        lengths(255, 5, world=2, repeats=3)
    for size, accum in ((6, 1), (2, 3)):
        with refused("10", "the 12 of a step"):
            lengths(10, size, recipe="timm", world=2, accum=accum)


SOURCE = DummyImages(50, 24, 7, seed=1)


def test_loader():
    """The same tensors from 0, 1 and 3 workers and after a resume; nothing is drawn elsewhere."""
    transform = train_transform("timm", 16)
    how = {"rank": 1, "world": 2, "recipe": "timm"}
    before = torch.random.get_rng_state()
    want = epoch_of(SOURCE, transform, epoch=4, **how)
    assert len(want) == 6 and want[0][0].shape == (4, 3, 16, 16)
    assert want[0][0].dtype == torch.uint8 and want[0][1].dtype == torch.int64
    for workers in (1, 3):
        assert same(want, epoch_of(SOURCE, transform, epoch=4, workers=workers, **how))
    assert same(want[2:], epoch_of(SOURCE, transform, epoch=4, skip=2, **how))
    assert not same(want, epoch_of(SOURCE, transform, epoch=5, **how))
    loader = ImageLoader(SOURCE, transform, 4, seed=3, train=True, workers=2, **how)
    for _ in loader:  # leave an epoch early, then have another
        break
    loader.set_epoch(4)
    assert same(want, list(loader)) and len(loader) == 6
    assert torch.equal(before, torch.random.get_rng_state())


def test_ranks_share_the_samples():
    """One process that takes the batches of both ranks sees what they see; tests come once each."""
    transform = train_transform("timm", 16)
    parts = [epoch_of(SOURCE, transform, 5, epoch=4, rank=rank, world=2) for rank in range(2)]
    for whole, left, right in zip(epoch_of(SOURCE, transform, 10, epoch=4), *parts):
        assert torch.equal(whole[0][0::2], left[0]) and torch.equal(whole[0][1::2], right[0])
    for rank in range(3):
        shard = epoch_of(SOURCE, eval_transform(16, 16), 8, train=False, rank=rank, world=3)
        assert (torch.cat([y for _, y in shard]).numpy() == SOURCE.labels[rank::3]).all()


def first_number(image, rng):
    return torch.tensor([int(rng.integers(2 ** 62))])


def test_each_copy_is_augmented_its_own_way():
    """The copies of an image in an epoch, and an image in two epochs, draw other numbers."""
    numbers = [x for epoch in range(2) for rank in range(2) for x, _ in epoch_of(
        DummyImages(256, 2, 2), first_number, 32, epoch, rank=rank, world=2, repeats=3)]
    assert len(torch.cat(numbers).unique()) == 512


def test_dummy_images():
    assert len({SOURCE.read(i).tobytes() for i in range(50)}) == 50
    assert SOURCE.read(7).shape == (24, 24, 3) and set(SOURCE.labels) == set(range(7))


@pytest.mark.parametrize("count", [1, 7, 45, 89, 90])
def test_fewer_images(count):
    """Evenly spaced in a sorted source: classes keep their shares, and what is read is theirs."""
    source = DummyImages(90, 4, 5)
    source.labels.sort()
    fewer = FewerImages(source, count)
    assert len(fewer) == count == len(set(fewer.indices)) and fewer.classes == source.classes
    share = np.bincount(source.labels) * count / 90
    assert (abs(np.bincount(fewer.labels, minlength=5) - share) < 1).all(), share
    for i, j in enumerate(fewer.indices):
        assert (fewer.read(i) == source.read(j)).all() and fewer.labels[i] == source.labels[j]
    with refused("91", "90 training images"):
        FewerImages(source, 91)


def test_workers_end_with_their_epoch():
    """A test loader beside a training loader does not double the processes."""
    loaders = [ImageLoader(DummyImages(8, 8, 2), eval_transform(8, 8), 4, seed=0, train=train,
                           workers=2) for train in (True, False)]
    others = set(multiprocessing.active_children())
    for loader in loaders * 2:
        for _ in loader:
            assert len(set(multiprocessing.active_children()) - others) <= 2
        assert set(multiprocessing.active_children()) <= others


# ---------------------------------------------------------------- fingerprints

def test_fingerprint_of_dummies():
    sources = [DummyImages(*how) for how in (
        (8, 4, 2), (9, 4, 2), (8, 5, 2), (8, 4, 3), (8, 4, 2, 1))]
    sources += [FewerImages(sources[0], 4), FewerImages(sources[0], 5), FewerImages(sources[1], 4)]
    assert len({source.fingerprint for source in sources}) == 8
    assert sources[0].fingerprint == DummyImages(8, 4, 2).fingerprint


def test_fingerprint_of_folders(folders):
    """Of the classes' and files' names, sizes and labels; not of where they lie."""
    def check(root):
        return open_images(root, "train").fingerprint
    prints = [check(folders)]
    assert check(folders.rename(folders.with_name("away"))) == prints[0]
    assert re.fullmatch("[0-9a-f]{16}", prints[0])
    train = folders.with_name("away") / "train"
    for old, new in (("cat/cat_1.jpg", "dog/cat_1.jpg"), ("cat/cat_0.jpg", "cat/cat_9.jpg"),
                     ("dog/cat_1.jpg", "cat/dog_1.jpeg"), ("cat", "zebra"), ("zebra", "ant")):
        (train / old).rename(train / new)
        prints.append(check(train.parent))
    Image.new("L", (9, 9)).save(train / "dog" / "dog_1.jpg")
    assert len({*prints, check(train.parent)}) == 7


def test_fingerprint_of_packed(folders, tmp_path):
    """Of the files that were packed, and how; not of where the packing lies."""
    def check(name, size=8):
        images.pack(folders, tmp_path / name, size)
        return open_images(tmp_path / name, "train").fingerprint
    prints = [check("a"), check("b", size=9)]
    assert check("c") == prints[0]
    (folders / "train" / "cat" / "cat_0.jpg").rename(folders / "train" / "cat" / "cat_9.jpg")
    prints.append(check("d"))
    labels = tmp_path / "a" / "train.labels.npy"
    np.save(labels, 1 - np.load(labels))
    prints.append(open_images(tmp_path / "a", "train").fingerprint)
    assert len(set(prints)) == 4


# ---------------------------------------------------------------- class folders

def test_folders(folders):
    """Classes and files found, in which order."""
    cat = folders / "train" / "cat"
    (cat / "b").mkdir()
    (cat / "b" / "up").symlink_to(cat)  # does not end in a loop
    for name in ("a.JPEG", "b.Jpg", "d.png", "b/e.png"):
        (cat / name).write_bytes(b"")
    (cat / "g.jpg").symlink_to(cat / "d.png")
    for hidden in ("train/.cache/x.jpg", "train/cat/.h.jpg", "train/cat/notes.txt", "train/x.jpg"):
        (folders / hidden).parent.mkdir(exist_ok=True)
        (folders / hidden).write_text("not an image of")
    train = open_images(folders, "train")
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0] * 10 + [1] * 4
    assert train.labels.dtype == np.int64 and [os.fsdecode(name) for name in train.names] == [
        "a.JPEG", "b.Jpg", os.path.join("b", "e.png"), *(f"cat_{i}.jpg" for i in range(5)),
        "d.png", "g.jpg", *(f"dog_{i}.jpg" for i in range(4))]
    (folders / "val").rename(folders / "validation")
    val = open_images(folders, "val", train.classes)
    assert len(val) == 4 and "validation" in val.where
    assert val.path(3) == str(folders / "validation" / "dog" / "dog_1.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_what_is_no_file_is_left_out(folders):
    """FIFOs, devices, folders with an image's name; and the links to them."""
    cat = folders / "train" / "cat"
    os.mkfifo(cat / "pipe.png")
    (cat / "to-pipe.png").symlink_to("pipe.png")
    (cat / "device.png").symlink_to("/dev/zero")
    (cat / "folder.png").mkdir()
    assert len(open_images(folders, "train")) == 9


@pytest.mark.parametrize("rank, quiet", [("0", None), ("1", True)])
def test_one_rank_shows_the_listing(folders, monkeypatch, rank, quiet):
    monkeypatch.setenv("RANK", rank)
    with mock.patch.object(images, "tqdm", side_effect=lambda names, *_, **how: names) as bar:
        open_images(folders, "train")
    assert bar.call_args[1]["disable"] is quiet


@needs_pillow
@pytest.mark.parametrize("name, mode, how, error", [
    ("a.JPEG", "CMYK", {}, 100), ("b.Jpg", "L", {}, None), ("c.JPEG", "RGB", {"format": "PNG"}, 0),
    ("d.png", "RGBA", {}, 0), ("e.png", "P", {}, None), ("g.bmp", "RGB", {}, 0),
    ("h.tif", "RGB", {}, 0), ("i.webp", "RGB", {"lossless": True}, 0), ("j.pgm", "L", {}, None),
    ("f.jpg", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0"}, None)])
def test_every_kind_of_file_is_read_as_rgb(tmp_path, name, mode, how, error):
    """By content, whatever the name; broken metadata, which ImageNet has, is no matter."""
    array = smooth_image(0, 30, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment.pillow.cache_clear()
        Image.fromarray(array).convert(mode).save(tmp_path / name, **how)
        image = images.read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (40, 30)
    got = np.asarray(image).astype(int)
    if error is not None:
        assert np.abs(got - array).max() <= error
    elif mode == "L":
        assert (got[..., 0] == got[..., 2]).all()


@needs_pillow
@pytest.mark.parametrize("name, dtype", [("x.png", "<u2"), ("x.tif", "<u2"), ("big.tif", ">u2"),
                                         ("x.pgm", "<u2"), ("x.tif", "<i4")])
def test_sixteen_bit_grey_is_scaled(tmp_path, name, dtype):
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64).round()
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / name)
    got = np.asarray(images.read_image(tmp_path / name)).astype(float)
    assert np.abs(got - ramp[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize("old, new, split, words", [
    ("", "../away", "train", ["set", "not a folder"]), ("val", "away", "val", ["no folder 'val'"]),
    ("val", "away", "test", ["no folder 'test'"]),
    ("val/dog", "val/bird", "val", ["lacks 'dog' and has 'bird'"]),
    ("empty", "train/eel", "train", ["no image file", "'eel' of", "set/train"]),
    ("train/dog", "away", "train", ["set/train holds 'cat' alone"]),
    ("val/cat", "train/cat/deep", "val", ["lacks 'cat' and has none"]),
    ("train/cat", "valid", "valid", ["valid holds no class folders"])])
def test_bad_folders(folders, old, new, split, words):
    """One sentence for each thing that can be wrong with a folder."""
    (folders / "empty").mkdir()
    (folders / old).rename(folders / new)
    with refused(*words) as caught:
        open_images(folders, split, None if split == "train" else ["cat", "dog"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b"", "not an image of"), (b"hello", "not an image of"), ("half", "truncated"),
    (None, "No such file"), (np.zeros((400, 300), np.uint8), "exceeds limit"),
    # Pillow would start Ghostscript for the first of these, and read the second
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of"),
    (b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "not an image of"),
    # and saturate these
    (np.ones((4, 4), np.float32), "range"), (np.full((4, 4), 65536, np.int32), "range"),
    (np.full((4, 4), -1, np.int32), "range")])
def test_bad_files(folders, monkeypatch, content, words):
    """Named in one sentence, also from a worker process."""
    bad, good = folders / "train" / "dog" / "bad.tif", folders / "train" / "cat" / "cat_0.jpg"
    if content is None:
        bad.symlink_to(folders / "gone")
    elif isinstance(content, np.ndarray):
        Image.fromarray(content).save(bad)
    else:
        bad.write_bytes(good.read_bytes()[:900] if content == "half" else content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with refused(bad, words) as caught:
        epoch_of(open_images(folders, "train"), train_transform("torchvision", 8),
                 workers=2 if words == "truncated" else 0)
    assert "\n" not in str(caught.value)


def test_too_little_memory(folders, monkeypatch):
    """No fault of the image, which is not to be removed."""
    monkeypatch.setattr(Image.Image, "convert", mock.Mock(side_effect=MemoryError))
    Image.new("L", (9, 9)).save(folders / "good.png")
    with refused("memory", "good.png", "fewer --workers") as caught:
        images.read_image(folders / "good.png")
    assert "remove" not in str(caught.value)


def test_without_pillow(tmp_path, monkeypatch):
    """Random and packed images need none; what does says how to get it."""
    images.write_packed(tmp_path, "train", SOURCE, {"count": 50, "size": 16, "classes": [
        *"0123456"]}, 0)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    augment.pillow.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    for source in (SOURCE, open_images(tmp_path, "train")):
        for recipe in ("torchvision", "timm"):
            assert len(epoch_of(source, train_transform(recipe, 12), recipe=recipe)) >= 12
        assert len(epoch_of(source, eval_transform(16, 12), train=False)) == 13
    for call in (lambda: open_images(tmp_path, "val"),
                 lambda: train_transform("timm", 8, policy="ta_wide"),
                 lambda: train_transform("timm", 8, policy="rand-m9")):
        with refused("pip install pillow"):
            call()


# ---------------------------------------------------------------- packing

@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words) is (exit status, stdout, stderr) of `python images.py`."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["images.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(images.__file__, run_name="__main__")
        return stop.value.code, *capsys.readouterr()
    return run


@pytest.mark.parametrize("words", [["shapes"], ["pack"], ["pack", "a", "b", "--size", "0"],
                                   ["pack", "a", "b", "--workers", "-1"]])
def test_wrong_command(command, words):
    status, out, errors = command(*words)
    assert status == 2 and not out and "images.py: " in errors


def test_pack(folders, command, tmp_path):
    """A packed split is its images, each shrunk and centred."""
    packed = tmp_path / "packed"
    status, out, _ = command("pack", folders, packed, "--workers", 2)
    assert status == 0 and "9 images of 256x256, 2 classes" in out
    shrink = eval_transform(256, 256, "bicubic")
    for split in ("train", "val"):
        one, two = open_images(folders, split), open_images(packed, split)
        assert "(packed)" in two.where and one.classes == two.classes
        assert (one.labels == two.labels).all()
        for i in range(len(one)):
            assert (shrink(one.read(i)).permute(1, 2, 0).numpy() == two.read(i)).all()
    for source in (one, two):
        transform = train_transform("torchvision", 16, policy="ta_wide")
        assert same(epoch_of(source, transform), epoch_of(source, transform, workers=2))
    assert len(pickle.dumps(two)) < 2000  # no worker is sent the images
    assert (pickle.loads(pickle.dumps(two)).read(1) == two.read(1)).all()
    assert open_images(packed, "validation", two.classes).classes == two.classes
    with refused("'cow'", "'dog'"):
        open_images(packed, "val", ["cat", "cow"])


@pytest.mark.parametrize("src, dst, size, words", [
    ("set", "packed", 16, ["another packing", "8 pixels"]), ("packed", "x", 8, ["packed already"]),
    ("set", "x", 10 ** 7, ["3900000.0 GB"]), ("set", "set/", 8, ["the images themselves"]),
    ("set", "set/train/cat/cat_0.jpg", 8, ["cannot write", "cat_0"]),
    ("set", "~who?/x", 8, ["~who?/x", "in full"]), ("~who?/x", "x", 8, ["~who?/x", "in full"])])
def test_refused_packing(folders, monkeypatch, src, dst, size, words):
    monkeypatch.chdir(folders.parent)
    images.pack("set", "packed", 8)
    with refused(*words):
        images.pack(src, dst, size)


def test_pack_again(folders, command, tmp_path):
    """Nothing to do; interrupted: begun anew; damaged: refused."""
    packed = tmp_path / "packed"
    command("pack", folders, packed, "--size", 1)
    array = packed / "train.images.npy"
    stamp, whole = array.stat().st_mtime_ns, array.read_bytes()
    said = command("pack", folders, packed, "--size", 1, "--workers", 0)[1]
    assert said.count("left as it is") == 2
    assert array.stat().st_mtime_ns == stamp
    (packed / "train.packed.json").unlink()
    array.rename(packed / "train.images.npy.part")
    with refused("interrupted"):
        open_images(packed, "train")
    command("pack", folders, packed, "--size", 1)
    assert array.read_bytes() == whole
    array.write_bytes(whole[:-1])
    with refused("damaged", packed):
        open_images(packed, "train")
    array.unlink()
    with refused("No such file", "train.images.npy"):
        open_images(packed, "train")
    (folders / "train" / "dog" / "bad.png").write_text("text")
    status, _, errors = command("pack", folders, tmp_path / "other", "--size", 1, "--workers", 0)
    assert status == 2 and "bad.png" in errors and errors.count("\n") == 1
    assert not (tmp_path / "other" / "train.packed.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors have names on Linux")
@pytest.mark.parametrize("full", ["train.images.npy", "train.labels.npy", "train.packed.json"])
def test_packing_onto_a_full_disk(folders, tmp_path, monkeypatch, full):
    """One sentence, and nothing half-written is left to fill it."""
    def no_space(descriptor):
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == full + ".part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", no_space)
    with refused(tmp_path / "packed", "No space left"):
        images.pack(folders, tmp_path / "packed", 8)
    assert not list((tmp_path / "packed").glob("*.part"))
    with refused("train"):
        open_images(tmp_path / "packed", "train")
    monkeypatch.undo()
    images.pack(folders, tmp_path / "packed", 8)
    assert len(open_images(tmp_path / "packed", "train")) == 9


def test_foreign_packing(tmp_path):
    """Files of the right names that hold other things than images.py writes."""
    about = {"count": 9, "size": 4, "classes": ["cat", "dog"]}
    with mock.patch.object(images, "tqdm") as bar:
        images.write_packed(tmp_path, "train", DummyImages(9, 4, 2), about, 0)
    assert bar.return_value.__enter__.return_value.update.call_args_list == [mock.call(9)]
    labels = np.load(tmp_path / "train.labels.npy")
    assert open_images(tmp_path, "train").labels.dtype == labels.dtype == np.int64
    for wrong in (labels / 4, labels.astype(str), labels + 1, labels - 1, labels[1:]):
        np.save(tmp_path / "train.labels.npy", wrong)
        with refused("belong together", "images.py pack"):
            open_images(tmp_path, "train")
    (tmp_path / "train.packed.json").write_text('{"count": 9, "size": 4, "classes": 2}')
    with refused("damaged", "images.py pack"):
        open_images(tmp_path, "train")


# ---------------------------------------------------------------- signals

def kill_worker(image, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def fail_in_worker(image, rng):
    raise RuntimeError("a mistake of the program")


def test_killed_worker():
    with refused("memory"):
        epoch_of(SOURCE, kill_worker, workers=1)


def test_failing_worker():
    """Not the user's mistake: all of it is shown."""
    with pytest.raises(RuntimeError, match="fail_in_worker") as caught:
        epoch_of(SOURCE, fail_in_worker, workers=1)
    traceback.clear_frames(caught.tb)  # they hold the worker


SIGNALLED = """
import signal, time
from augment import train_transform
from images import DummyImages, ImageLoader
loader = ImageLoader(DummyImages(4000, 32, 5), train_transform("torchvision", 16), 8, seed=0,
                     train=True, workers=2)
heard = []
def note(*_):
    heard.append(i)
    if len(heard) == 3: raise KeyboardInterrupt
try:
    for i, _ in enumerate(loader):
        if i == 3:  # not before the workers start: they would inherit it
            signal.signal(signal.SIGTERM, note), signal.signal(signal.SIGINT, note)
            print("go", flush=True)
        if heard and i == heard[-1] + 20: print("goes on", flush=True)
        time.sleep(0.02)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"),
                    reason="this system does not tell who sent a signal")
def test_signals():
    """A signal to every process is the main one's affair; no worker survives it."""
    run = subprocess.Popen([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.PIPE, cwd=Path(__file__).parent,
                           start_new_session=True)
    try:
        assert run.stdout.readline() == "go\n", run.communicate()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(run.pid, number)
            assert run.stdout.readline() == "goes on\n", run.communicate()
        os.killpg(run.pid, signal.SIGINT)
        out, errors = run.communicate(timeout=60)
        assert out == "interrupted\n" and not errors and run.returncode == 0, (out, errors)
        with pytest.raises(ProcessLookupError):     # no worker is left
            os.killpg(run.pid, 0)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
