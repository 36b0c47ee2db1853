"""augment.py: crops, mixing and erasing, the policies' operations and what they draw."""
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
    from PIL import Image, ImageFilter
except ImportError:
    Image = None
needs_pillow = pytest.mark.skipif(Image is None, reason="Pillow is not installed")
RECIPES = pytest.mark.parametrize("recipe", ["torchvision", "timm"])
RATIO = (3 / 4, 4 / 3)


def smooth_image(seed, height, width):
    """An (H, W, 3) uint8 array with structure at all scales."""
    return random_state(seed).integers(0, 2, (height, width, 3)).cumsum(0).cumsum(1).astype(
        np.uint8) ^ random_state(seed, 1).integers(0, 32, (height, width, 3), np.uint8)


ARRAY = smooth_image(2, 90, 130) // 2 + 60  # not where levels are cut off
KINDS = pytest.mark.parametrize("image", [
    pytest.param(ARRAY, id="array"),
    pytest.param(Image and Image.fromarray(ARRAY), id="Pillow", marks=needs_pillow)])


def test_random_state():
    """Numbers of another length are another stream; numpy alone takes missing ones for zeros."""
    streams = [(3,), (3, 0), (3, 0, 0), (3, 0, 0, 0), (0, 3), (3, 2), (3, 1, 2), (3, 1, 2, 0),
               (3, 1, 2, 4), (3, 1, 2, 3)]
    assert len({int(random_state(*numbers).integers(2 ** 62)) for numbers in streams}) == 10


# ---------------------------------------------------------------- from an image to a tensor

def test_random_crop():
    """Share of the area, logarithm of the ratio and place are uniform."""
    rng = random_state(0)
    top, left, h, w = np.array([augment.random_crop(400, 400, (0.1, 0.4), RATIO, rng)
                                for _ in range(4000)]).T
    for drawn, low, high in ((h * w / 400 ** 2, 0.1, 0.4), (np.log(w / h), *np.log(RATIO)),
                             (top / (400 - h), 0, 1), (left / (400 - w), 0, 1)):
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert drawn.std() == pytest.approx((high - low) / 12 ** 0.5, rel=0.03)
        assert low - 0.01 < drawn.min() and drawn.max() < high + 0.01


@pytest.mark.parametrize("args, boxes", [
    ((3, 3, (0.4, 0.5), (1, 1)), {(i, j, 2, 2) for i in range(2) for j in range(2)}),
    ((8, 20, (0.8, 0.8), (2, 2)), {(0, j, 8, 16) for j in range(5)}),   # a side is the image's
    ((33, 500, (1, 1), RATIO), {(0, 228, 33, 44)}), ((500, 33, (1, 1), RATIO), {(228, 0, 44, 33)}),
    ((1, 1, (0.08, 1), RATIO), {(0, 0, 1, 1)}), ((8, 8, (1, 1), (50, 90)), {(3, 0, 1, 8)})])
def test_crops_of_few_places(args, boxes):
    """Every place that fits comes; where none does, the largest central part, not of no height."""
    rng = random_state(1)
    assert {augment.random_crop(*args, rng) for _ in range(200)} == boxes


def test_ten_tries():
    rng = random_state(2)
    whole = [augment.random_crop(4000, 4000, (0.9, 1), RATIO, rng)[2:] == (4000, 4000)
             for _ in range(2000)]
    areas = np.linspace(0.9, 1, 10_001)
    fits = (-np.log(areas) / math.log(4 / 3)).mean()        # |log ratio| ≤ -log area
    assert np.mean(whole) == pytest.approx((1 - fits) ** 10, rel=0.12)


@needs_pillow
@KINDS
@pytest.mark.parametrize("interpolation", augment.INTERPOLATIONS)
@pytest.mark.parametrize("box, size", [((10, 20, 70, 90), (40, 60)), ((0, 0, 50, 30), (64, 64)),
                                       ((0, 0, 90, 130), (90, 130)), ((3, 5, 1, 2), (24, 24))])
def test_resize(image, interpolation, box, size):
    """Up to two levels as Pillow does it."""
    top, left, h, w = box
    want = Image.fromarray(ARRAY[top:top + h, left:left + w]).resize(
        size[::-1], Image.Resampling[interpolation.upper()])
    got = augment.resize(image, box, size, interpolation)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - np.asarray(want)).max() <= 2
    assert got.is_contiguous()


@KINDS
@pytest.mark.parametrize("resize, crop, interpolation, size, top, left", [
    (50, 40, "bilinear", (50, 72), 5, 16),       # long side floor(50·130/90) = 72
    (45, 40, "bicubic", (45, 65), 2, 12),        # halves go to the even side: round(12.5) = 12
    (47, 40, "bilinear", (47, 67), 4, 14),       # round(3.5) = 4, round(13.5) = 14
    (40, 40, "bilinear", (40, 57), 0, 8)])       # round(8.5) = 8
def test_eval_transform(image, resize, crop, interpolation, size, top, left):
    whole = augment.resize(image, (0, 0, 90, 130), size, interpolation)
    got = eval_transform(resize, crop, interpolation)(image)
    assert torch.equal(got, whole[:, top:top + crop, left:left + crop])


@RECIPES
def test_defaults_of_a_recipe(recipe):
    settings = train_transform(recipe, 8).keywords
    assert (settings["interpolation"], settings["color_jitter"]) == (
        ("random", 0.4) if recipe == "timm" else ("bilinear", 0.0))
    assert train_transform(recipe, 8, "bicubic", color_jitter=0.1).keywords["color_jitter"] == 0.1


def test_crop_larger_than_the_image():
    with refused("224", "200"):
        eval_transform(200, 224)


@KINDS
@pytest.mark.parametrize("interpolation", augment.INTERPOLATIONS)
def test_train_transform(image, interpolation):
    """A random crop in this interpolation, mirrored or not."""
    box = augment.random_crop(90, 130, (0.08, 1.0), RATIO, random_state(7))
    want = augment.resize(ARRAY, box, (24, 24), interpolation)
    plain, mirrored = (train_transform("torchvision", 24, interpolation, hflip=p)(
        image, random_state(7)) for p in (0, 1))
    assert torch.equal(plain, want) and torch.equal(mirrored, want.flip(2))


@needs_pillow
def test_jitter():
    """The colour jitter, which needs no Pillow, is made of the policies' operations."""
    array = smooth_image(5, 30, 30)
    for seed in range(8):
        rng, image = random_state(seed), Image.fromarray(array)
        got = augment.jitter(torch.from_numpy(array).permute(2, 0, 1), 0.4, random_state(seed))
        for k in rng.permutation(3):
            image = augment.operate(image, ("brightness", "contrast", "color")[k],
                                    rng.uniform(0.6, 1.4))
        difference = np.abs(np.asarray(image).astype(int) - got.permute(1, 2, 0).numpy())
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, seed


# ---------------------------------------------------------------- mixing and erasing

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
LABELS = torch.arange(8)
IMAGES = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 20, 30) * 30


def partner(x, recipe):
    """What each of a batch is mixed with."""
    return x.flip(0) if recipe == "timm" else x.roll(1, 0)


def test_finish_without_mixing():
    plain = Finish(MEAN, STD, 10)
    x, target = plain(IMAGES, LABELS, (1, 2))
    want = (IMAGES.double() / 255 - torch.tensor(MEAN)[:, None, None]) \
        / torch.tensor(STD)[:, None, None]
    assert target is LABELS and torch.equal(x, plain.eval(IMAGES)) and x.dtype == torch.float32
    torch.testing.assert_close(x.double(), want, atol=1e-6, rtol=0)
    never = Finish(MEAN, STD, 10, mixup_alpha=1.0, mixup_prob=0.0)
    assert torch.equal(never(IMAGES, LABELS, (0,))[1], F.one_hot(LABELS, 10).float())


@RECIPES
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_labels_are_mixed_as_images_are(recipe, alphas):
    """Each image's content, read off its pixels, is its target: its own label's and its partner's.

    CutMix mixes no pixel: each is one image's or the other's.
    """
    own = F.one_hot(LABELS, 8)
    images = own.to(torch.uint8).mul(200)[:, :, None, None].expand(-1, -1, 16, 16)
    finish = Finish((0.0,) * 8, (1.0,) * 8, 8, recipe=recipe, **alphas)
    for seed in range(5):
        x, target = finish(images, LABELS, (seed,))
        content = x.mean((2, 3)) * 255 / 200                # (8 images, 8 channels = labels)
        torch.testing.assert_close(content, target, atol=4e-3, rtol=0)      # timm rounds to 1/255
        share = target[0, 0]
        torch.testing.assert_close(target, own * share + partner(own, recipe) * (1 - share))
        assert 0 < share < 1 and (len(x.unique()) > 2) == ("mixup_alpha" in alphas)
        assert torch.equal(x, finish(images, LABELS, (seed,))[0])


@RECIPES
def test_order_of_mixing_and_erasing(recipe):
    """torchvision's erased zeros are mixed with the neighbour, timm's erasing is on top."""
    finish = Finish(MEAN, STD, 10, recipe=recipe, mixup_alpha=0.8, erase_prob=0.6)
    x, target = finish(IMAGES, LABELS, (3,))
    share, rng = target[0, 0], random_state(3)
    finish.draw_mix(20, 30, rng)

    def mixed(x):
        return x * share + partner(x, recipe) * (1 - share)
    if recipe == "timm":
        want = finish.erase(finish.eval(mixed(IMAGES.float()).round()), rng)
    else:
        want = mixed(finish.erase(finish.eval(IMAGES), rng))
    torch.testing.assert_close(x, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("coin, alpha", [(0.29, 1.0), (0.3, 0.2)])
def test_mixup_or_cutmix(coin, alpha):
    """CutMix with probability switch_prob; each asks for its own α."""
    rng = mock.Mock(**{"random.side_effect": [0.9, coin], "beta.return_value": 0.5,
                       "integers.return_value": 4})
    both = Finish(MEAN, STD, 10, mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.3)
    assert (both.draw_mix(8, 8, rng)[1] is not None) == (alpha == 1.0)
    rng.beta.assert_called_once_with(alpha, alpha)


@RECIPES
@pytest.mark.parametrize("centre, box", [((0, 0), (0, 0, 3, 6)), ((7, 15), (4, 9, 10, 21)),
                                         ((19, 39), (16, 33, 20, 40))])
def test_box_of_cutmix(recipe, centre, box):
    """Of the share 1 - λ, about a random centre; what the border cuts off counts for λ."""
    rng = mock.Mock(**{"random.return_value": 0.9, "beta.return_value": 0.9,
                       "integers.side_effect": centre})
    got = Finish(MEAN, STD, 10, recipe=recipe, cutmix_alpha=1.0).draw_mix(20, 40, rng)
    assert got[1] == box and rng.integers.call_args_list == [mock.call(20), mock.call(40)]
    assert got[0] == pytest.approx(1 - (box[2] - box[0]) * (box[3] - box[1]) / 800)


@RECIPES
def test_smoothing(recipe):
    """Smoothing the targets before mixing them or in the loss afterwards is the same."""
    logits, labels = torch.randn(6, 10), torch.arange(6)
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    smoothed, sharp = (Finish(MEAN, STD, 10, recipe=recipe, mixup_alpha=0.8, smoothing=s)
                       for s in (0.1, 0.0))
    soft, hard = (finish(images, labels, (5,))[1] for finish in (smoothed, sharp))
    torch.testing.assert_close(smoothed.loss(logits, soft),
                               F.cross_entropy(logits, hard, label_smoothing=0.1))
    assert smoothed.loss(logits, labels) == F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("recipe, area, ratio", [
    ("torchvision", (0.02, 0.33), (0.3, 3.3)), ("timm", (0.02, 1 / 3), (0.3, 1 / 0.3))])
def test_erased_rectangle(recipe, area, ratio):
    """Its limits are those of torchvision's RandomErasing and of timm's; ten tries to fit."""
    erase = Finish(MEAN, STD, 2, recipe=recipe, erase_prob=0.25).erase
    tries = [(1.0, 0.8), (0.5, 1.6), (0.5, 0.4), (0.25, 2.0)]   # share of the area, height/width
    drawn = [number for share, aspect in tries for number in (share, math.log(aspect))]
    rng = mock.Mock(**{"random.return_value": np.array([0.25, 0.2]), "uniform.side_effect": drawn,
                       "integers.side_effect": [7, 3, 5]})
    want = torch.ones(2, 3, 40, 50)
    want[1, :, 3:35, 5:21] = 0          # 500 pixels: 32 high, 16 wide; the others are as the image
    assert torch.equal(erase(torch.ones(2, 3, 40, 50), rng), want)
    assert rng.integers.call_args_list[1:] == [mock.call(40 - 32 + 1), mock.call(50 - 16 + 1)]
    for call, limits in zip(rng.uniform.call_args_list, (area, np.log(ratio))):
        assert call.args == pytest.approx(limits, rel=1e-12)
    rng = mock.Mock(**{"random.return_value": np.zeros(1), "uniform.return_value": 2.0,
                       "integers.return_value": 0})
    assert erase(torch.ones(1, 3, 9, 9), rng).all() and rng.uniform.call_count == 20


@pytest.mark.parametrize("mode, values", [("const", 1), ("rand", 1), ("pixel", 100)])
def test_erasing(mode, values):
    """How many images, and what they are filled with: zeros, a normal colour, normal noise."""
    x = torch.full((3000, 3, 20, 30), 9.0)
    finish = Finish(MEAN, STD, 2, erase_prob=0.25, erase_mode=mode)
    got = finish.erase(x.clone(), random_state(1))
    hit = [image[:, (image != 9).any(0)] for image in got if (image != 9).any()]
    assert len(hit) / 3000 == pytest.approx(0.25, rel=0.06)
    colours = torch.cat([channel.unique() for pixels in hit for channel in pixels])
    assert len(colours) == 3 * len(hit) if values == 1 else len(colours) > 30 * len(hit)
    spread = 0 if mode == "const" else 1
    assert abs(colours.mean()) < 0.1 and abs(colours.std() - spread) < 0.1
    assert len(colours.unique()) == 1 if mode == "const" else len(colours.unique()) > 2000
    assert torch.equal(got, finish.erase(x.clone(), random_state(1)))


# ---------------------------------------------------------------- the policies

FILL = (124, 116, 104)
FACTORS, SLOPES, PIXELS = (0.1, 0.19, 1, 1.81, 1.99), (-2, 0, 2), (-32, 0, 12, 90)
VALUES = {"identity": [None], "autocontrast": [None], "equalize": [None], "invert": [None],
          "brightness": FACTORS, "color": FACTORS, "contrast": FACTORS, "sharpness": FACTORS,
          "posterize": (-4, *range(9), 12), "solarize": (0, 26, 127.5, 255, 256),
          "solarize_add": (0, 99, 128), "rotate": (-90, 0, 90, 180), "shear_x": SLOPES,
          "shear_y": SLOPES, "translate_x": PIXELS, "translate_y": PIXELS}


def by_formula(name, value, x):
    """One operation of the policies on an (H, W, 3) uint8 array."""
    grey = (x.astype(int) @ [19595, 38470, 7471] + 32768) >> 16
    bases = {"brightness": 0, "color": grey[..., None], "contrast": int(grey.mean() + 0.5),
             "sharpness": Image.fromarray(x).filter(ImageFilter.SMOOTH)}
    if name in bases:
        base = np.asarray(bases[name], np.float32)
        return np.clip(base + np.float32(value) * (x - base), 0, 255).astype(np.uint8)
    if name == "rotate":                                    # counter-clockwise
        return np.rot90(x, value // 90)
    if name.endswith("_y"):
        return by_formula(name[:-1] + "x", value, x.swapaxes(0, 1)).swapaxes(0, 1)
    if name.endswith("_x"):                                 # a shear: slope times centre's height
        row, column = np.mgrid[:x.shape[0], :x.shape[1]]
        source = column + (value if name == "translate_x" else value * row + value // 2)
        inside = (source >= 0) & (source < x.shape[1])
        return np.where(inside[..., None], x[row, source % x.shape[1]], FILL)
    return {"identity": lambda: x, "invert": lambda: 255 - x,
            "posterize": lambda: x // 2.0 ** (8 - value) * 2.0 ** (8 - value),
            "solarize": lambda: np.where(x < value, x, 255 - x),
            "solarize_add": lambda: np.where(x < 128, np.minimum(x + value, 255), x)}[name]()


@needs_pillow
@pytest.mark.parametrize("name", VALUES)
def test_operation(name):
    array = smooth_image(3, 50, 50) // 2 + 40
    image = Image.fromarray(array)
    for value in VALUES[name]:
        got = np.asarray(augment.operate(image, name, value, "bilinear", FILL))
        if name == "autocontrast":
            assert (got.min((0, 1)) == 0).all() and (got.max((0, 1)) == 255).all()
        elif name == "equalize":                            # all levels alike
            assert got.mean((0, 1)) == pytest.approx([255 / 2] * 3, rel=0.1)
            assert got.std((0, 1)) == pytest.approx([255 / 12 ** 0.5] * 3, rel=0.1)
        else:
            assert (got == by_formula(name, value, array)).all(), value


@needs_pillow
@pytest.mark.parametrize("interpolation, weights", [
    ("bilinear", (0, 8, 8, 0)), ("bicubic", (-2, 10, 10, -2))])
def test_interpolation_of_an_operation(interpolation, weights):
    """Half a pixel further lies what the filter makes of four; corners get the fill's colour."""
    array = smooth_image(3, 50, 50) // 2 + 60
    image = Image.fromarray(array)
    got = np.asarray(augment.operate(image, "translate_x", 0.5, interpolation)).astype(int)
    want = sum(w * array[:, k:k + 47].astype(int) for k, w in enumerate(weights)) / 16
    assert np.abs(got[:, 1:48] - want).max() <= 1
    turned = augment.operate(image, "rotate", 30, interpolation, FILL)
    assert turned == image.rotate(30, Image.Resampling[interpolation.upper()], fillcolor=FILL)
    assert turned.getpixel((0, 0)) == FILL


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
    """One of 14 operations alike, one of 31 strengths, either sign."""
    log = drawn(augment.trivial_augment, 4000)
    assert all(len(entry) == 1 and entry[0][2:] == ("bilinear", (0, 0, 0)) for entry in log)
    seen = {name: [entry[0][1] for entry in log if entry[0][0] == name]
            for name in augment.TRIVIAL_AUGMENT}
    rates = [len(values) / 4000 for values in seen.values()]
    assert rates == pytest.approx([1 / 14] * 14, rel=0.25)
    for name, values in seen.items():
        possible = {augment.trivial_value(name, k, sign) for k in range(31) for sign in (1, -1)}
        assert set(values) <= possible and len(set(values)) > 0.9 * len(possible)
    assert np.mean([value > 0 for value in seen["rotate"]]) == pytest.approx(0.5, abs=0.1)


def test_strengths_of_trivial_augment():
    """torchvision's, from the weakest to the strongest."""
    factors = np.linspace(0, 0.99, 31)
    # torch.linspace(0, 32, 31)[15], of which torchvision takes the integer, is 15.999999
    pixels = [*range(16), *range(17, 31), 32]
    tables = {"posterize": 8 - np.round(np.arange(31) / 5), "solarize": np.linspace(255, 0, 31)}
    for sign in (1, -1):
        tables |= dict.fromkeys(("brightness", "color", "contrast", "sharpness"),
                                1 + sign * factors)
        tables |= dict.fromkeys(("shear_x", "shear_y"), sign * factors)
        tables |= dict.fromkeys(("translate_x", "translate_y"), [-sign * n for n in pixels])
        tables["rotate"] = sign * np.linspace(0, 135, 31)
        for name in augment.TRIVIAL_AUGMENT:
            got = [augment.trivial_value(name, step, sign) for step in range(31)]
            assert got == (pytest.approx(tables[name]) if name in tables else [None] * 31)
    assert set(VALUES) == {*augment.TRIVIAL_AUGMENT, *augment.RAND_AUGMENT}, "all are tested"


@needs_pillow
@pytest.mark.parametrize("policy", ["ta_wide", "rand-m9-p1"])
@pytest.mark.parametrize("interpolation, want", [
    ("bilinear", {"bilinear"}), ("bicubic", {"bicubic"}), ("random", {"bilinear", "bicubic"})])
def test_settings_of_the_policies(policy, interpolation, want):
    """The interpolation is that of training; timm fills with the mean colour, torchvision black."""
    calls = [call for entry in drawn(train_transform(
        "torchvision", 8, interpolation, policy, mean=(0.5, 0.2, 1.0)).keywords["policy"], 40)
        for call in entry]
    assert {call[2] for call in calls} == want
    assert {call[3] for call in calls} == {(0, 0, 0) if policy == "ta_wide" else (128, 51, 255)}


def test_rand_augment():
    """What is drawn: operations, strengths, signs, filters."""
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
    assert abs(degrees).max() == 30 and len(np.unique(degrees)) > 100  # a magnitude above 10 is 10


@pytest.mark.parametrize("text, level, sign, want", [
    ("rand-inc1", 0.9, 1, {"rotate": 27, "posterize": 1, "solarize": 26, "solarize_add": 99,
                           "color": 1.81, "contrast": 1.81, "brightness": 1.81, "sharpness": 1.81,
                           "shear_x": 0.27, "shear_y": 0.27, "translate_x": 81,
                           "translate_y": 40.5}),
    ("rand-inc1", 0.9, -1, {"color": 0.19, "rotate": -27, "translate_y": -40.5}),
    ("rand-inc1", 1.0, -1, {"posterize": 0, "solarize": 0, "brightness": 0.1}),
    ("rand-inc1", 2.0, 1, {"solarize_add": 128, "solarize": 0}),
    ("rand", 0.9, -1, {"posterize": 3, "solarize": 230, "color": 1.72})])
def test_strengths_of_rand_augment(text, level, sign, want):
    """timm's, for operations that grow with the magnitude and for the others."""
    policy = RandAugment(text)
    got = {name: policy.value(name, level, sign, (200, 100)) for name in want}
    assert got == pytest.approx(want, rel=1e-12)


def test_words_of_a_policy():
    """In any order."""
    policy = RandAugment("rand-n3-p1.0-m7-mmax8-mstd101")
    assert (policy.layers, policy.prob, policy.magnitude, policy.increasing) == (3, 1.0, 7, False)
    log = drawn(policy, 600)
    assert all(len(entry) == 3 for entry in log)
    degrees = [abs(call[1]) for entry in log for call in entry if call[0] == "rotate"]
    assert np.mean(degrees) == pytest.approx(10.5, rel=0.15), "mstd above 100: uniform from 0 to m"
    assert max(degrees) <= 21
    policy = RandAugment("rand-inc0")
    assert policy.increasing and (policy.magnitude, policy.layers, policy.prob) == (10, 2, 0.5)
    degrees = [abs(call[1]) for entry in drawn(policy, 60) for call in entry if call[0] == "rotate"]
    assert set(degrees) == {30}, "no deviation"


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
    for i in range(20):
        got = transform(Image.fromarray(ARRAY), random_state(i))
        assert got.shape == (3, 20, 20) and got.dtype == torch.uint8
        assert torch.equal(got, transform(Image.fromarray(ARRAY), random_state(i)))
