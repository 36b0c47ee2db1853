"""augment.py: crops, the policies' operations against formulas in numpy, mixing and erasing."""
import math
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
from augment import Finish, RandAugment, eval_transform, random_state, train_transform
from test_download import refused

try:
    from PIL import Image
except ImportError:
    Image = None
needs_pillow = pytest.mark.skipif(Image is None, reason="Pillow is not installed")
RECIPES = pytest.mark.parametrize("recipe", ["torchvision", "timm"])


def smooth_image(seed, height, width):
    """An (H, W, 3) uint8 array with structure at all scales."""
    return random_state(seed).integers(0, 2, (height, width, 3)).cumsum(0).cumsum(1).astype(
        np.uint8) ^ random_state(seed, 1).integers(0, 32, (height, width, 3), np.uint8)


def test_random_state():
    """Numbers of another length are another stream; numpy alone takes missing ones for zeros."""
    streams = [(3,), (3, 0), (3, 0, 0), (3, 0, 0, 0), (0, 3), (3, 2), (3, 1, 2), (3, 1, 2, 0),
               (3, 1, 2, 4), (3, 1, 2, 3)]
    assert len({int(random_state(*numbers).integers(2 ** 62)) for numbers in streams}) == 10


# ---------------------------------------------------------------- from an image to a tensor

def test_random_crop():
    """Share of the area, ratio and place of a random crop; what happens when none fits."""
    rng = random_state(0)
    boxes = np.array([augment.random_crop(400, 400, (0.1, 0.4), (3 / 4, 4 / 3), rng)
                      for _ in range(4000)])
    top, left, h, w = boxes.T
    area, aspect = h * w / 400 ** 2, np.log(w / h)
    assert area.mean() == pytest.approx(0.25, rel=1e-2)
    assert area.var() == pytest.approx(0.3 ** 2 / 12, rel=5e-2), "uniform"
    assert aspect.var() == pytest.approx((2 * math.log(4 / 3)) ** 2 / 12, rel=5e-2)
    assert abs(aspect.mean()) < 0.01 and area.min() > 0.098 and area.max() < 0.402
    assert (top / (400 - h)).mean() == pytest.approx(0.5, rel=3e-2)
    assert (left / (400 - w)).var() == pytest.approx(1 / 12, rel=5e-2)
    corners = {augment.random_crop(3, 3, (0.4, 0.5), (1, 1), rng)[:2] for _ in range(200)}
    assert corners == {(i, j) for i in range(2) for j in range(2)}
    for args, box in (((33, 500, (1, 1), (3 / 4, 4 / 3)), (0, 228, 33, 44)),
                      ((500, 33, (1, 1), (3 / 4, 4 / 3)), (228, 0, 44, 33)),
                      ((1, 1, (0.08, 1), (3 / 4, 4 / 3)), (0, 0, 1, 1)),
                      ((8, 8, (1, 1), (50, 90)), (3, 0, 1, 8))):        # not of no height
        assert augment.random_crop(*args, rng) == box
    _, _, h, w = augment.random_crop(400, 400, (0.1, 0.1), (2, 2), rng)
    assert abs(w - 2 * h) <= 1, "ratio is width/height"
    wide = {augment.random_crop(8, 16, (0.5, 0.5), (1, 1), rng) for _ in range(200)}
    assert wide == {(0, left, 8, 8) for left in range(9)}, "a side may be the image's"
    whole = [augment.random_crop(4000, 4000, (0.9, 1), (3 / 4, 4 / 3), rng)[2:] == (4000, 4000)
             for _ in range(2000)]
    areas = np.linspace(0.9, 1, 10_001)
    fits = (-np.log(areas) / math.log(4 / 3)).mean()            # |log ratio| ≤ -log area
    assert np.mean(whole) == pytest.approx((1 - fits) ** 10, rel=0.12), "after ten tries"


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


ARRAY = smooth_image(2, 90, 130) // 2 + 60  # not where levels are cut off
KINDS = pytest.mark.parametrize("image", [
    pytest.param(ARRAY, id="array"),
    pytest.param(Image and Image.fromarray(ARRAY), id="Pillow", marks=needs_pillow)])


@KINDS
@pytest.mark.parametrize("interpolation", augment.INTERPOLATIONS)
@pytest.mark.parametrize("box, size", [((10, 20, 70, 90), (40, 40)), ((0, 0, 50, 30), (64, 64)),
                                       ((0, 0, 90, 130), (90, 130)), ((3, 5, 1, 2), (24, 24))])
def test_resize(image, interpolation, box, size):
    got = augment.resize(image, box, size, interpolation).permute(1, 2, 0)
    top, left, h, w = box
    want = filtered(ARRAY[top:top + h, left:left + w].astype(float), size, interpolation)
    assert np.abs(got.double().numpy() - want).max() < 1.8


@needs_pillow
def test_resize_as_pillow():
    want = Image.fromarray(ARRAY).resize((60, 60), Image.Resampling.BILINEAR)
    got = augment.resize(ARRAY, (0, 0, 90, 130), (60, 60), "bilinear").permute(1, 2, 0)
    assert np.abs(got.numpy().astype(int) - np.asarray(want)).max() <= 2


@KINDS
@pytest.mark.parametrize("resize, crop, interpolation, size, top, left", [
    (50, 40, "bilinear", (50, 72), 5, 16),       # long side floor(50·130/90) = 72
    (45, 40, "bicubic", (45, 65), 2, 12),        # halves go to the even side: round(12.5) = 12
    (47, 40, "bilinear", (47, 67), 4, 14),       # round(3.5) = 4, round(13.5) = 14
])
def test_eval_transform(image, resize, crop, interpolation, size, top, left):
    whole = augment.resize(image, (0, 0, 90, 130), size, interpolation)
    got = eval_transform(resize, crop, interpolation)(image)
    assert torch.equal(got, whole[:, top:top + crop, left:left + crop])


def test_crop_larger_than_the_image():
    with refused("224", "200"):
        eval_transform(200, 224)


@KINDS
def test_flip(image):
    for seed in range(6):
        plain, flipped = (train_transform("torchvision", 24, hflip=p)(image, random_state(seed))
                          for p in (0, 1))
        assert torch.equal(plain.flip(2), flipped) and plain.is_contiguous()
        array = train_transform("torchvision", 24, hflip=0)(ARRAY, random_state(seed))
        assert torch.equal(plain, array)


# ---------------------------------------------------------------- mixing and erasing

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
LABELS = torch.arange(8)
IMAGES = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 20, 30) * 30


def partner(x, recipe):
    """What each of a batch is mixed with."""
    return x.flip(0) if recipe == "timm" else x.roll(1, 0)


def test_normalize():
    for k in range(3):
        want = (IMAGES[:, k].double() / 255 - MEAN[k]) / STD[k]
        got = augment.normalize(IMAGES, MEAN, STD)[:, k].double()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_finish_without_mixing():
    plain = Finish(MEAN, STD, 10)
    x, target = plain(IMAGES, LABELS, (1, 2))
    assert target is LABELS and torch.equal(x, augment.normalize(IMAGES, MEAN, STD))
    assert torch.equal(x, plain.eval(IMAGES))
    assert Finish(MEAN, STD, 10, mixup_alpha=1.0, mixup_prob=0.0)(
        IMAGES, LABELS, (0,))[1].max() == 1


@RECIPES
def test_cutmix(recipe):
    """λ is the share of pixels that an image keeps; the rest is its partner's."""
    cutmix = Finish(MEAN, STD, 10, recipe=recipe, cutmix_alpha=1.0)
    own = cutmix.eval(IMAGES)
    for seed in range(20):
        x, target = cutmix(IMAGES, LABELS, (seed,))
        kept = (x == own).all(1).flatten(1).double().mean(1)
        torch.testing.assert_close(target[LABELS, LABELS].double(), kept, atol=1e-6, rtol=0)
        assert (x == own).logical_or(x == partner(own, recipe)).all()
        assert torch.equal(x, cutmix(IMAGES, LABELS, (seed,))[0])


@RECIPES
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_labels_are_mixed_as_images_are(recipe, alphas):
    """Each image's content, read off its pixels, is its target: of one label and of the other."""
    images = F.one_hot(LABELS, 8).to(torch.uint8).mul(200)[:, :, None, None].expand(-1, -1, 16, 16)
    finish = Finish((0.0,) * 8, (1.0,) * 8, 8, recipe=recipe, **alphas)
    for seed in range(5):
        x, target = finish(images, LABELS, (seed,))
        content = x.mean((2, 3)) * 255 / 200                # (8 images, 8 channels = labels)
        torch.testing.assert_close(content, target, atol=4e-3, rtol=0)      # timm rounds to 1/255
        assert (target > 0).sum() == 16, "two labels each"


@RECIPES
def test_mixup_and_its_order(recipe):
    """torchvision's erased zeros are mixed with the neighbour, timm's erasing is on top."""
    def make(**how):
        return Finish(MEAN, STD, 10, recipe=recipe, mixup_alpha=0.8, **how)
    mixed, target = make()(IMAGES, LABELS, (3,))
    share = target[0, 0]
    want = IMAGES.double() * share + partner(IMAGES, recipe).double() * (1 - share)
    want = want.round() if recipe == "timm" else want
    torch.testing.assert_close(
        mixed.double(), augment.normalize(want, MEAN, STD, torch.float64), atol=1e-5, rtol=0)
    both = make(erase_prob=0.6)
    x, _ = both(IMAGES, LABELS, (3,))
    rng = random_state(3)
    both.draw_mix(20, 30, rng)
    if recipe == "timm":
        want = both.erase(mixed.clone(), rng)
        assert (x == 0).all(1).flatten(1).any(1).sum() >= 2
    else:
        alone = both.erase(both.eval(IMAGES), rng)
        want = alone * share + partner(alone, recipe) * (1 - share)
    torch.testing.assert_close(x, want, atol=1e-6, rtol=0)


class Recorder:
    """A generator that draws nothing special and notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def beta(self, a, b):
        self.asked.append((a, b))
        return 0.5

    def uniform(self, low, high):
        self.asked.append((low, high))
        return (low + high) / 2

    def random(self, shape=None):
        return np.zeros(shape) if shape else 0.7 if len(self.asked) % 2 else 0.3

    def integers(self, n):
        return 0


def test_mixup_and_cutmix_share_the_batches():
    """Each asks for its own α."""
    both = Finish((0.1,) * 3, (0.4,) * 3, 10, mixup_alpha=0.2, cutmix_alpha=1.0)
    rng = Recorder()
    assert [both.draw_mix(8, 8, rng)[1] is not None for _ in range(2)] == [True, False]
    assert rng.asked == [(1.0, 1.0), (0.2, 0.2)]
    chosen = [both.draw_mix(8, 8, random_state(i))[1] is not None for i in range(2000)]
    assert np.mean(chosen) == pytest.approx(0.5, rel=6e-2)


@RECIPES
def test_box_of_cutmix(recipe):
    """Of the share 1 - λ, about a random centre; what the border cuts off counts for λ."""
    for centre, box in (((0, 0), (0, 0, 3, 6)), ((7, 15), (4, 9, 10, 21))):
        rng = mock.Mock()
        rng.random.return_value, rng.beta.return_value, rng.integers.side_effect = 0, 0.9, centre
        got = Finish(MEAN, STD, 10, recipe=recipe, cutmix_alpha=1.0).draw_mix(20, 40, rng)
        area = (box[2] - box[0]) * (box[3] - box[1])
        assert got[1] == box and got[0] == pytest.approx(1 - area / 800)


@RECIPES
def test_smoothing(recipe):
    """Smoothing the targets before mixing them or in the loss afterwards is the same."""
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    smoothed, sharp = (Finish((0,) * 3, (1,) * 3, 10, recipe=recipe, mixup_alpha=0.8, smoothing=s)
                       for s in (0.1, 0.0))
    soft, hard = (finish(images, labels, (5,))[1] for finish in (smoothed, sharp))
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(smoothed.loss(logits, soft),
                               F.cross_entropy(logits, hard, label_smoothing=0.1))
    assert smoothed.loss(logits, labels) == F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("recipe, mode", [
    ("torchvision", "const"), ("timm", "pixel"), ("timm", "rand")])
def test_erasing(recipe, mode):
    """Rate, area, ratio and content of the erased rectangles, one for an image."""
    x = torch.full((3000, 3, 40, 50), 9.0)
    finish = Finish((0,) * 3, (1,) * 3, 2, recipe=recipe, erase_prob=0.25, erase_mode=mode)
    got = finish.erase(x.clone(), random_state(1))
    gone = (got != 9).any(1)
    hit = gone.flatten(1).any(1)
    assert hit.double().mean().item() == pytest.approx(0.25, rel=6e-2)
    h, w = gone[hit].any(2).sum(1).double(), gone[hit].any(1).sum(1).double()
    assert torch.equal(gone[hit].flatten(1).sum(1), (h * w).long())  # a full rectangle each
    share, large = h * w / 2000, h * w > 200  # rounding changes small ones much
    assert gone.any(0).any(0).all() and gone.any(0).any(1).all()     # up to each border
    assert share.min() > 0.015 and share.max() < 0.355 and h.max() < 40 and w.max() < 50
    assert share.mean().item() == pytest.approx(0.17, rel=6e-2)
    assert 0.27 < (w / h)[large].min() < 0.4 and 2.6 < (w / h)[large].max() < 3.7
    filled = got[gone[:, None].expand_as(got)]
    values = [got[i, 0][gone[i]].unique().numel() for i in hit.nonzero().flatten()[:20]]
    if mode == "const":
        assert (filled == 0).all()
    else:
        tolerance = 1e-2 if mode == "pixel" else 1e-1
        assert abs(filled.mean()) < tolerance and abs(filled.std() - 1) < tolerance
        assert max(values) == 1 if mode == "rand" else min(values) > 10
    assert torch.equal(got, finish.erase(x.clone(), random_state(1)))


@pytest.mark.parametrize("recipe, area, ratio", [
    ("torchvision", (0.02, 0.33), (0.3, 3.3)), ("timm", (0.02, 1 / 3), (0.3, 1 / 0.3))])
def test_limits_of_erasing(recipe, area, ratio):
    """Those of torchvision's RandomErasing and of timm's."""
    rng = Recorder()
    Finish((0,) * 3, (1,) * 3, 2, recipe=recipe, erase_prob=0.25).erase(torch.ones(2, 3, 9, 9), rng)
    assert rng.asked[0] == area and np.exp(rng.asked[1]) == pytest.approx(ratio, rel=1e-12)


# ---------------------------------------------------------------- the policies

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


FACTORS, SLOPES, PIXELS = (0.1, 0.19, 1, 1.81, 1.99), (-0.99, -0.27, 0.297), (-32, 0, 12.71, 90)
VALUES = {"identity": [None], "autocontrast": [None], "equalize": [None], "invert": [None],
          "brightness": FACTORS, "color": FACTORS, "contrast": FACTORS, "sharpness": FACTORS,
          "posterize": (-4, *range(9), 12), "solarize": (0, 26, 127.5, 255, 256),
          "solarize_add": (0, 99, 128), "rotate": (-135, -27, 4.5, 30), "shear_x": SLOPES,
          "shear_y": SLOPES, "translate_x": PIXELS, "translate_y": PIXELS}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def test_every_operation_is_tested():
    assert set(VALUES) == set(augment.TRIVIAL_AUGMENT) | set(augment.RAND_AUGMENT)


@needs_pillow
@pytest.mark.parametrize("name", VALUES)
def test_operation(name):
    """Pillow's operations against formulas in numpy."""
    flat = np.full((8, 9, 3), (7, 7, 200), np.uint8)
    two = flat.copy()
    two[:4] = 250
    fill = (124, 116, 104)
    for array in (smooth_image(3, 50, 40), smooth_image(4, 40, 64) // 3 + 20, flat, two):
        for value in VALUES[name]:
            got = np.asarray(augment.operate(Image.fromarray(array), name, value, "bilinear", fill))
            wrong = np.abs(got.astype(int) - by_formula(name, value, array, fill))
            # Pillow adds up coordinates along a row: a few fall on the other side of a pixel's
            # edge, or of an integer's when levels are cut off
            assert (wrong > 0).mean() <= (0.02 if name in GEOMETRIC else 0), value
            assert (wrong > 1).mean() <= 0.002, value


@needs_pillow
def test_jitter():
    """The colour jitter, which needs no Pillow, is made of the same operations."""
    array = smooth_image(5, 30, 30)
    for seed in range(8):
        rng, image = random_state(seed), Image.fromarray(array)
        got = augment.jitter(torch.from_numpy(array).permute(2, 0, 1), 0.4, random_state(seed))
        for k in rng.permutation(3):
            image = augment.operate(image, ("brightness", "contrast", "color")[k],
                                    rng.uniform(0.6, 1.4))
        difference = np.abs(np.asarray(image).astype(int) - got.permute(1, 2, 0).numpy())
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, seed


def drawn(policy, count, size=(200, 100)):
    """[[(name, value, filter, fill), ...] for each image]: what a policy asks of `operate`."""
    log, image = [], mock.Mock(size=size)

    def record(image, name, value=None, interpolation="bilinear", fill=(0, 0, 0)):
        log[-1].append((name, value, interpolation, fill))
        return image

    with mock.patch.object(augment, "operate", record):
        for i in range(count):
            log.append([])
            policy(image, random_state(11, i))
    return log


def test_trivial_augment():
    """One of 14 operations alike, torchvision's strengths, either sign."""
    log = drawn(augment.trivial_augment, 4000)
    assert all(len(entry) == 1 and entry[0][2:] == ("bilinear", (0, 0, 0)) for entry in log)
    seen = {name: {entry[0][1] for entry in log if entry[0][0] == name}
            for name in augment.TRIVIAL_AUGMENT}
    rates = [np.mean([entry[0][0] == name for entry in log]) for name in seen]
    assert rates == pytest.approx([1 / 14] * 14, rel=0.25)
    assert seen["identity"] == seen["autocontrast"] == seen["equalize"] == {None}
    assert seen["posterize"] == {8, 7, 6, 5, 4, 3, 2}
    steps = (0, 2, 3, 7, 8, 12, 13, 22, 23, 27, 28)
    bits = [augment.trivial_value("posterize", step, 1) for step in steps]
    assert bits == [8, 8, 7, 7, 6, 6, 5, 4, 3, 3, 2]
    ends = {"solarize": (255, 0), "rotate": (0, 135)}
    ends |= dict.fromkeys(("shear_x", "shear_y"), (0, 0.99))
    ends |= dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (1, 1.99))
    for name, want in ends.items():
        assert [augment.trivial_value(name, step, 1) for step in (0, 30)] == pytest.approx(want)
        if name != "solarize":  # where 0 and -135 are as likely as 0 and 135
            assert np.mean([value > want[0] for value in seen[name]]) == pytest.approx(0.5, abs=0.1)
    for axis in "xy":        # as torchvision: torch.linspace gives 15.999999 at strength 15
        pixels = [-augment.trivial_value(f"translate_{axis}", step, 1) for step in range(31)]
        assert pixels == [*range(16), *range(17, 31), 32] and isinstance(pixels[0], int)
        assert augment.trivial_value(f"translate_{axis}", 15, -1) == 15


@needs_pillow
@pytest.mark.parametrize("policy", ["ta_wide", "rand-m9-p1"])
@pytest.mark.parametrize("interpolation, want", [
    ("bilinear", {"bilinear"}), ("bicubic", {"bicubic"}), ("random", {"bilinear", "bicubic"})])
def test_interpolation_reaches_the_policies(policy, interpolation, want):
    """As in torchvision, where --interpolation is that of training, its policies included."""
    policy = train_transform("torchvision", 8, interpolation, policy).keywords["policy"]
    assert {call[2] for entry in drawn(policy, 40) for call in entry} == want


@pytest.mark.parametrize("interpolation", augment.INTERPOLATIONS)
def test_interpolation_of_the_crop(interpolation):
    image, rng = smooth_image(1, 30, 40), random_state(2)
    box = augment.random_crop(30, 40, (0.08, 1.0), (3 / 4, 4 / 3), rng)
    got = train_transform("torchvision", 16, interpolation, hflip=0)(image, random_state(2))
    assert torch.equal(got, augment.resize(image, box, (16, 16), interpolation))


@needs_pillow
def test_mean_colour_fills_the_border():
    """timm's: of the mean that images are normalised with; torchvision fills with black."""
    for recipe, policy, fill in (("timm", "rand-m9-p1", (128, 51, 255)),
                                 ("torchvision", "ta_wide", (0, 0, 0))):
        policy = train_transform(recipe, 8, policy=policy, mean=(0.5, 0.2, 1.0)).keywords["policy"]
        assert {call[3] for entry in drawn(policy, 40) for call in entry} == {fill}


def test_rand_augment():
    """What is drawn: operations, strengths, signs, filters; timm's values at magnitude 9."""
    policy = RandAugment("rand-m9-mstd0.5-inc1")
    log = drawn(policy, 4000)
    counts = np.bincount([len(entry) for entry in log], minlength=3) / 4000
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.03), "images with 0, 1, 2 operations"
    calls = [call for entry in log for call in entry]
    rates = [np.mean([call[0] == name for call in calls]) for name in augment.RAND_AUGMENT]
    assert rates == pytest.approx([1 / 15] * 15, rel=0.25)
    assert np.mean([c[2] == "bicubic" for c in calls]) == pytest.approx(0.5, rel=0.06)
    assert {call[3] for call in calls} == {(124, 116, 104)}
    degrees = np.array([call[1] for call in calls if call[0] == "rotate"])
    assert abs(degrees).mean() == pytest.approx(27, rel=0.02)
    assert (degrees > 0).mean() == pytest.approx(0.5, rel=0.2)
    assert abs(degrees).max() == 30  # a magnitude above 10 is 10
    assert drawn(RandAugment("rand-m9", "bilinear"), 40) != drawn(policy, 40)
    want = {"rotate": 27, "posterize": 1, "solarize": 26, "solarize_add": 99, "color": 1.81,
            "contrast": 1.81, "brightness": 1.81, "sharpness": 1.81, "shear_x": 0.27,
            "shear_y": 0.27, "translate_x": 81, "translate_y": 40.5}
    at9 = {name: policy.value(name, 0.9, 1, (200, 100)) for name in augment.RAND_AUGMENT}
    assert {k: v for k, v in at9.items() if v is not None} == pytest.approx(want, rel=1e-12)
    assert policy.value("color", 0.9, -1, (1, 1)) == pytest.approx(0.19, rel=1e-12)
    assert policy.value("posterize", 1.0, 1, (1, 1)) == 0
    assert policy.value("solarize_add", 2.0, 1, (1, 1)) == 128
    assert policy.value("brightness", 1.0, -1, (1, 1)) == 0.1


def test_words_of_a_policy():
    """In any order."""
    policy = RandAugment("rand-n3-p1.0-m7-mmax8-mstd101")
    assert (policy.layers, policy.prob, policy.magnitude, policy.increasing) == (3, 1.0, 7, False)
    log = drawn(policy, 600)
    assert all(len(entry) == 3 for entry in log)
    degrees = [abs(call[1]) for entry in log for call in entry if call[0] == "rotate"]
    assert np.mean(degrees) == pytest.approx(10.5, rel=0.15), "mstd above 100: uniform from 0 to m"
    assert max(degrees) <= 21 and RandAugment("rand-inc0").increasing
    assert RandAugment("rand").magnitude == 10
    plain = [policy.value(name, 0.9, -1, (1, 1)) for name in ("posterize", "solarize", "color")]
    assert plain == pytest.approx([3, 230, 1.72], rel=1e-12), "not increasing"


@needs_pillow
@pytest.mark.parametrize("text, word", [
    ("rand-m9-x1", "x1"), ("rand-m", "'m'"), ("rand-m9.5", "m9.5"), ("rand-w0", "w0"),
    ("rand--m9", "''"), ("rand-p1.2.3", "p1.2.3"), ("rand-n0", "at least 1"),
    ("rand-p2", "at most 1"), ("augmix", "ta_wide")])
def test_wrong_policy(text, word):
    with refused(text, word):
        train_transform("timm", 8, policy=text)


@needs_pillow
@pytest.mark.parametrize("policy", ["rand-m10-p1-n3-inc1", "rand-m3-p1", "ta_wide"])
def test_transform_with_a_policy(policy):
    """It travels to a worker process, and gives the same image for the same numbers."""
    transform = pickle.loads(pickle.dumps(train_transform("timm", 20, policy=policy)))
    image = Image.fromarray(smooth_image(1, 30, 30))
    for i in range(20):
        got = transform(image, random_state(i))
        assert got.shape == (3, 20, 20) and torch.equal(got, transform(image, random_state(i)))
    assert transform(smooth_image(1, 30, 30), random_state(1)).dtype == torch.uint8


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
