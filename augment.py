"""The published augmentation policies, op by op, and what becomes of an image on its way to a net.

    transform = train_transform("torchvision", 176, policy="ta_wide")    # in worker processes
    image = transform(image, random_state(seed, epoch, position))        # (3, 176, 176) uint8
    finish = Finish(mean, std, 1000, mixup_alpha=0.2, cutmix_alpha=1.0)  # on the device
    x, target = finish(images, labels, (seed, epoch, rank, batch))

Two recipes are here: "torchvision", that of its ResNets, and "timm", that of DeiT and Swin.
Pillow is needed for the policies and for nothing else. Every random number comes from a generator
that is passed in.
"""
import functools
import math
import re
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from download import DataError

INTERPOLATIONS = ("bilinear", "bicubic")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, 255 being 1


@functools.lru_cache(None)
def pillow(what="decoding image files"):
    """Pillow's Image module, imported when something needs it and not before."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{what} needs Pillow: pip install pillow") from error
    # About a dozen files of ImageNet have such metadata; their pixels are all right.
    warnings.filterwarnings("ignore", r"\(?(possibly\)? )?corrupt EXIF data", UserWarning)
    return Image


def is_timm(recipe):
    """Whether a recipe is "timm", the transformers', or "torchvision", the ResNets'."""
    if recipe not in ("torchvision", "timm"):
        raise ValueError(f"recipe is {recipe!r}, but must be 'torchvision' or 'timm'")
    return recipe == "timm"


def seed_sequence(*numbers):
    """A numpy SeedSequence from non-negative integers; how many there are counts too.

    numpy fills up with zeros, so that without their count (3, 1) would be the same as (3, 1, 0).
    """
    return np.random.SeedSequence((*numbers, len(numbers)))


def random_state(*numbers):
    """A numpy Generator that depends on these non-negative integers and nothing else."""
    return np.random.Generator(np.random.PCG64(seed_sequence(*numbers)))


def resize(image, box, size, interpolation):
    """The part box = (top, left, height, width) of an image as a (3, *size) uint8 tensor.

    image: PIL RGB, or an (H, W, 3) uint8 array. Shrinking is antialiased, as it always is in
    Pillow, with the same filters. Both compute in integers and round between rows and columns, so
    that they differ: in 2% of the values, mostly by one level, and neither is closer to the exact
    filter; but torch takes a fifth of the time.
    """
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        image = image[top:top + height, left:left + width]
    elif (height, width) != size_of(image):
        image = image.crop((left, top, left + width, top + height))
    part = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]         # (1, 3, h, w)
    part = F.interpolate(part, size, mode=interpolation, antialias=True)
    return part[0].contiguous()


def size_of(image):
    """(height, width)"""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


def random_crop(height, width, scale, ratio, rng):
    """(top, left, height, width) of a random part of an image (Inception's crop).

    Its share of the area is uniform in `scale`, the logarithm of width/height uniform in `ratio`,
    its place uniform. When ten tries do not fit, the largest central part of an admitted ratio.
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def jitter(image, strength, rng):
    """Brightness, contrast and colour of a (3, H, W) uint8 tensor, changed in random order.

    Each is x -> d + f·(x - d), f uniform in 1 ± strength: d is black, the mean grey, or each
    pixel's own grey; cut off to 0...255 and to integers each time, as Pillow does.
    """
    for k in rng.permutation(3):
        factor, base = rng.uniform(max(0.0, 1 - strength), 1 + strength), 0.0
        if k:
            red, green, blue = image.int()
            grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16  # (H, W), Rec. 601
            base = int(grey.double().mean() + 0.5) if k == 1 else grey.float()
        image = (base + factor * (image.float() - base)).clamp_(0, 255).to(torch.uint8)
    return image


def train_transform(recipe, size, interpolation=None, policy=None, scale=(0.08, 1.0),
                    ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=None, mean=MEAN):
    """A callable transform(image, rng) -> (3, size, size) uint8 tensor, for training.

    recipe "torchvision" (the ResNets') or "timm" (the transformers') sets what is None:
    interpolation: bilinear, or "random" (bilinear or bicubic, a coin per image); the policy's too.
    color_jitter: none, or 0.4; never with a policy.
    policy: None, "ta_wide" or as in "rand-m9-mstd0.5-inc1"; see trivial_augment and RandAugment.
    scale, ratio: of the random crop; hflip: probability of mirroring. mean: what images will be
    normalised with, and RandAugment fills with. Raises DataError.
    """
    timm = is_timm(recipe)
    interpolation = interpolation or ("random" if timm else "bilinear")
    color_jitter = (0.4 if timm else 0.0) if color_jitter is None else color_jitter
    if policy:
        pillow(f"the policy {policy}")
        if policy == "ta_wide":
            policy = functools.partial(trivial_augment, interpolation=interpolation)
        elif policy.split("-")[0] == "rand":
            fill = tuple(min(255, round(255 * level)) for level in mean)
            policy = RandAugment(policy, interpolation, fill)
        else:
            raise DataError(f"no augmentation policy is called '{policy}'; choose ta_wide, or "
                            "RandAugment as in rand-m9-mstd0.5-inc1.")
    return functools.partial(  # which travels to a worker process, as a closure would not
        crop_and_augment, size=size, interpolation=interpolation, policy=policy, scale=scale,
        ratio=ratio, hflip=hflip, color_jitter=color_jitter)


def toss(interpolation, rng):
    """A filter's name, where "random" stands for either."""
    return INTERPOLATIONS[rng.integers(2)] if interpolation == "random" else interpolation


def crop_and_augment(image, rng, *, size, interpolation, policy, scale, ratio, hflip,
                     color_jitter):
    """image: PIL RGB or (H, W, 3) uint8; rng: numpy Generator. (3, size, size) uint8."""
    box = random_crop(*size_of(image), scale, ratio, rng)
    image = resize(image, box, (size, size), toss(interpolation, rng))
    if rng.random() < hflip:
        image = image.flip(2)
    if policy:  # made of Pillow's operations
        image = pillow().fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = np.array(policy(image, rng))
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return jitter(image, color_jitter, rng) if color_jitter else image


def eval_transform(resize, crop, interpolation="bilinear"):
    """A callable transform(image, rng=None) -> (3, crop, crop) uint8 tensor, for evaluation.

    The short side becomes `resize`, the long side is rounded down, the centre is cut out.
    Published: 232, 224, bilinear (ResNets) and 248, 224, bicubic (DeiT, Swin). Raises DataError.
    """
    if crop > resize:
        raise DataError(f"a centre crop of {crop} cannot be cut from images whose short side is "
                        f"{resize}; resize to at least {crop}.")
    return functools.partial(centre, short=resize, crop=crop, interpolation=interpolation)


def centre(image, rng=None, *, short, crop, interpolation):
    """image: PIL RGB or (H, W, 3) uint8. Its centre (3, crop, crop) uint8 at that short side."""
    height, width = size_of(image)
    size = height * short // min(height, width), width * short // min(height, width)
    image = resize(image, (0, 0, height, width), size, interpolation)
    top, left = (round((side - crop) / 2) for side in size)
    return image[:, top:top + crop, left:left + crop]


# ---------------------------------------------------------------- augmentation policies


def operate(image, name, value=None, interpolation="bilinear", fill=(0, 0, 0)):
    """One operation of the policies on a PIL image of mode RGB.

    value: a factor (brightness, color, contrast, sharpness: 1 changes nothing), degrees counter-
    clockwise (rotate), pixels (translate), a slope (shear, about the top left corner), the bits
    that are kept (posterize), the level from which on pixels are inverted (solarize), or what is
    added below level 128 (solarize_add). fill: the colour of what comes in from outside.
    """
    from PIL import Image, ImageEnhance, ImageOps
    if name == "identity":
        return image
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(image).enhance(value)
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    resample = Image.Resampling[interpolation.upper()]
    if name == "rotate":
        return image.rotate(value, resample, fillcolor=fill)
    matrix = {"shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
              "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value)}
    if name in matrix:
        return image.transform(image.size, Image.Transform.AFFINE, matrix[name], resample,
                               fillcolor=fill)
    levels = range(256)
    if name == "invert":
        table = [255 - v for v in levels]
    elif name == "posterize":  # a mask, since Pillow's own refuses 0 bits, which are black
        table = [v & ~((1 << max(0, 8 - value)) - 1) for v in levels]
    elif name == "solarize":
        table = [v if v < value else 255 - v for v in levels]
    elif name == "solarize_add":
        table = [min(255, v + value) if v < 128 else v for v in levels]
    return image.point(table * 3)


TRIVIAL_AUGMENT = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
                   "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
                   "autocontrast", "equalize")


def trivial_augment(image, rng, interpolation="bilinear"):
    """TrivialAugment (arXiv 2103.10158), the wide space: one operation of 14, one strength of 31.

    The strengths are torchvision's; what has two directions takes either.
    """
    name = TRIVIAL_AUGMENT[rng.integers(len(TRIVIAL_AUGMENT))]
    step, sign = int(rng.integers(31)), 1 - 2 * int(rng.integers(2))
    return operate(image, name, trivial_value(name, step, sign), toss(interpolation, rng))


def trivial_value(name, step, sign):
    """What `operate` gets for a strength of 0 to 30 and a sign."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1 + sign * 0.033 * step
    pixels = 15 if step == 15 else 32 * step // 30  # torch.linspace gives torchvision 15.999999
    return {"shear_x": sign * 0.033 * step, "shear_y": sign * 0.033 * step,
            "translate_x": -sign * pixels, "translate_y": -sign * pixels,
            "rotate": sign * 4.5 * step, "posterize": 8 - round(step / 5),
            "solarize": 255 - 8.5 * step}.get(name)


RAND_AUGMENT = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize",
                "solarize_add", "color", "contrast", "brightness", "sharpness", "shear_x",
                "shear_y", "translate_x", "translate_y")


class RandAugment:
    """RandAugment (arXiv 1909.13719) with timm's operations, strengths and grammar.

    text: `rand` and, between dashes in any order, m9: the magnitude (10); n2: operations per
    image (2); p0.5: the probability of each (0.5); mstd0.5: the standard deviation of the
    magnitude (0), above 100 it is uniform from 0 to m; mmax10: its upper limit (10); inc1: the
    operations whose effect grows with the magnitude throughout. (timm's w and t, weights and sets
    of operations, are not understood.) interpolation: as train_transform's. fill: the colour of
    what comes in from outside. Raises DataError.
    """

    def __init__(self, text, interpolation="random", fill=(124, 116, 104)):
        kinds = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": str}
        options = {"m": 10, "n": 2, "p": 0.5, "mstd": 0.0, "mmax": 10, "inc": ""}
        for word in text.split("-")[1:]:
            match = re.fullmatch(r"([a-z]+)(\d[\d.]*)", word)
            try:
                options[match[1]] = kinds[match[1]](match[2])
            except (TypeError, KeyError, ValueError) as error:
                raise DataError(f"'{word}' in the policy '{text}' is not understood; it is made "
                                "of rand, m9, n2, p0.5, mstd0.5, mmax10 and inc1.") from error
        self.magnitude, self.layers, self.prob = options["m"], options["n"], options["p"]
        self.deviation, self.largest = options["mstd"], options["mmax"]
        self.increasing, self.interpolation = bool(options["inc"]), interpolation
        self.fill = fill
        if self.layers < 1 or self.prob > 1:
            raise DataError(f"the policy '{text}' needs n of at least 1 and p of at most 1.")

    def __call__(self, image, rng):
        for k in rng.integers(len(RAND_AUGMENT), size=self.layers):
            if rng.random() >= self.prob:
                continue
            magnitude = self.magnitude
            if self.deviation > 100:
                magnitude = rng.uniform(0, magnitude)
            elif self.deviation > 0:
                magnitude = rng.normal(magnitude, self.deviation)
            level = min(max(magnitude, 0.0), self.largest) / 10
            interpolation = toss(self.interpolation, rng)
            sign = 1 - 2 * int(rng.integers(2))
            value = self.value(RAND_AUGMENT[k], level, sign, image.size)
            image = operate(image, RAND_AUGMENT[k], value, interpolation, self.fill)
        return image

    def value(self, name, level, sign, size):
        """What `operate` gets; level: magnitude/10; size: (width, height)."""
        if name in ("brightness", "color", "contrast", "sharpness"):
            return max(0.1, 1 + sign * 0.9 * level) if self.increasing else 0.1 + 1.8 * level
        bits, threshold = int(4 * level), min(256, int(256 * level))
        return {"rotate": sign * 30 * level,
                "posterize": 4 - bits if self.increasing else bits,
                "solarize": 256 - threshold if self.increasing else threshold,
                "solarize_add": min(128, int(110 * level)),
                "shear_x": sign * 0.3 * level, "shear_y": sign * 0.3 * level,
                "translate_x": sign * 0.45 * level * size[0],
                "translate_y": sign * 0.45 * level * size[1]}.get(name)


# ---------------------------------------------------------------- on the device


class Finish:
    """From uint8 images to what the network gets: normalised, erased, mixed, on their device.

    x, target = finish(images, labels, seed)     # training
    x = finish.eval(images)                      # normalises only

    recipe "torchvision" normalises, erases each image, then mixes it with its neighbour; "timm"
    mixes the uint8 images (rounding mixup) with the batch in reverse order, normalises, erases.
    erase_prob, erase_mode: random erasing (arXiv 1708.04896); "const" fills with the mean colour,
    "rand" with one normal colour, "pixel" with normal noise. mixup_alpha, cutmix_alpha: of the
    Beta(α, α) that mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) each draw λ from; 0
    switches one off; with both, CutMix has probability switch_prob. mixup_prob: of mixing a batch
    at all. smoothing: of the soft targets, when there is mixing; see `loss`.
    """

    def __init__(self, mean, std, num_classes, *, recipe="torchvision", erase_prob=0.0,
                 erase_mode="const", mixup_alpha=0.0, cutmix_alpha=0.0, mixup_prob=1.0,
                 switch_prob=0.5, smoothing=0.0):
        self.mean, self.std, self.num_classes = torch.tensor(mean), torch.tensor(std), num_classes
        self.timm = is_timm(recipe)
        self.erase_prob, self.erase_mode = erase_prob, erase_mode
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.mixup_prob, self.switch_prob, self.smoothing = mixup_prob, switch_prob, smoothing

    def __call__(self, images, labels, seed):
        """images (B, 3, H, W) uint8, labels (B,), seed: integers, (seed, epoch, rank, batch).

        Returns x (B, 3, H, W) float32 and the target: with mixing (B, C) float32, smoothed
        already; without, the labels. What is drawn comes from the CPU and depends on the seed
        alone, but for the noise of "pixel" and "rand", which the device's own generator makes.
        """
        rng = random_state(*seed)
        mixing = self.mixup_alpha > 0 or self.cutmix_alpha > 0
        if not mixing:
            return self.erase(self.eval(images), rng), labels
        mix = self.draw_mix(*images.shape[2:], rng)
        target = self.mix_targets(labels, mix[0])
        if self.timm:
            return self.erase(self.eval(self.mix(images, *mix)), rng), target
        return self.mix(self.erase(self.eval(images), rng), *mix), target

    def eval(self, images):
        """(images/255 - mean)/std in float32."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return normalize(images, self.mean, self.std)

    def partner(self, x):
        """For every image of the batch the one it is mixed with."""
        return x.flip(0) if self.timm else x.roll(1, 0)

    def draw_mix(self, height, width, rng):
        """(λ, box): the share that images keep; CutMix's (top, left, bottom, right), or None."""
        if rng.random() >= self.mixup_prob:
            return 1.0, None
        probability = (self.cutmix_alpha > 0) * (self.switch_prob if self.mixup_alpha > 0 else 1)
        cutmix = rng.random() < probability
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        share = float(rng.beta(alpha, alpha))
        if not cutmix:
            return share, None
        y, x = int(rng.integers(height)), int(rng.integers(width))
        h, w = (int(0.5 * math.sqrt(1 - share) * side) for side in (height, width))
        box = max(y - h, 0), max(x - w, 0), min(y + h, height), min(x + w, width)
        area = (box[2] - box[0]) * (box[3] - box[1])
        return 1 - area / (height * width), box  # what was cut off at the border counts

    def mix(self, images, share, box):
        """λ·x + (1 - λ)·partner, or the partner's pixels in the box."""
        if share == 1:
            return images
        if box is None:
            mixed = images.float() * share + self.partner(images).float() * (1 - share)
            return mixed.round_() if self.timm else mixed
        top, left, bottom, right = box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = self.partner(images)[:, :, top:bottom, left:right]
        return mixed

    def mix_targets(self, labels, share):
        """(B, C): λ·t + (1 - λ)·partner's, t having 1 - s + s/C at the label and s/C elsewhere.

        Smoothing after mixing, as torchvision does in its loss, gives the same: it is linear and
        λ + (1 - λ) = 1.
        """
        off = self.smoothing / self.num_classes
        target = torch.full((len(labels), self.num_classes), off, device=labels.device)
        target.scatter_(1, labels[:, None], 1 - self.smoothing + off)
        return target * share + self.partner(target) * (1 - share)

    def loss(self, logits, target):
        """Cross-entropy with label smoothing, which soft targets have in them already."""
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    def erase(self, x, rng):
        """Fill one random rectangle in some of the images, in place. x: (B, 3, H, W) float."""
        height, width = x.shape[2:]
        largest, ratio = (1 / 3, 1 / 0.3) if self.timm else (0.33, 3.3)
        chosen = np.flatnonzero(rng.random(len(x)) < self.erase_prob).tolist()
        generator = torch.Generator(x.device).manual_seed(int(rng.integers(2 ** 62)))
        for i in chosen:
            for _ in range(10):  # tries
                area = rng.uniform(0.02, largest) * height * width
                aspect = math.exp(rng.uniform(math.log(0.3), math.log(ratio)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                    part = x[i, :, top:top + h, left:left + w]
                    if self.erase_mode == "const":
                        part.zero_()
                    else:
                        shape = part.shape if self.erase_mode == "pixel" else (3, 1, 1)
                        part.copy_(torch.randn(shape, generator=generator, device=x.device))
                    break
        return x


def normalize(images, mean, std, dtype=torch.float32):
    """(images/255 - mean)/std for images (B, C, H, W) uint8; mean and std have C numbers."""
    mean = torch.as_tensor(mean, dtype=dtype, device=images.device).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=dtype, device=images.device).view(-1, 1, 1)
    return images.to(dtype).div_(255).sub_(mean).div_(std)
