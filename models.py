"""The networks of the papers' image experiments, one plain function each, and a GPT.

Every function returns an ordinary nn.Module that maps images (B, C, H, W) to logits
(B, num_classes). Tensors are NCHW throughout; the transformers work on tokens (B, T, D) or maps of
tokens (B, H, W, D) in between.

CIFAR networks, `name(num_classes=10, in_channels=3, image_size=32)` (32×32; all of them also take
the 1×28×28 of Fashion-MNIST), parameters counted for 3 channels and 10 classes:

    resnet20                 269,722    He et al. 2016, section 4.2 (arXiv 1512.03385):
    resnet32                 464,154      6n+2 layers of 16, 32, 64 channels,
    resnet44                 658,586      shortcuts without parameters ("option A")
    resnet56                 853,018
    resnet110              1,727,962
    resnet18_cifar        11,173,962    He et al. 2016, table 1 (the ImageNet networks), with a
    resnet34_cifar        21,282,122      3×3 stem of stride 1 and no max-pooling, so that
    resnet50_cifar        23,520,842      32×32 images arrive at the last stage as 4×4
    wrn28_10              36,479,194    Zagoruyko & Komodakis 2016 (arXiv 1605.07146)
    densenet121_cifar      6,956,298    Huang et al. 2017 (arXiv 1608.06993)
    vgg16_bn_cifar        15,253,578    Simonyan & Zisserman 2015 (arXiv 1409.1556), with batch
                                          norm and three linear layers of 512, 512, classes
    lenet5                    62,006    LeCun et al. 1998, in today's form: ReLU, max-pooling
    vit_nano_cifar           208,074    as the next one, of 4 layers and width 64: a Transformer
                                          that trains on a laptop
    deit_tiny_cifar        5,362,762    Touvron et al. 2021 (arXiv 2012.12877): DeiT-Tiny on
                                          4×4 patches, no distillation token

ImageNet networks, `name(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0)`, parameters
for 1000 classes. image_size None is 224; the ResNets take every size. drop is the dropout before
the classifier, drop_path the stochastic depth of the last block (see DropPath):

    resnet18, 34, 50         11,689,512   21,797,672   25,557,032   He et al. 2016, table 1
    resnet101, 152           44,549,160   60,192,808
    deit_{tiny,small,base}_patch16_224
                              5,717,416   22,050,664   86,567,656   Touvron et al. 2021
    swin_tiny_patch4_window7_224          28,288,354                Liu et al. 2021
                                                                      (arXiv 2103.14030)

Parameter names are torchvision's for the ResNets and timm's for DeiT and Swin, so that state dicts
of the same shapes can be exchanged; `load_pretrained` reads the published files. Within a module,
what is created first is listed first by `parameters()`; test_math.py relies on that order, so do
not reorder constructor lines lightly.
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F


def conv(in_planes, planes, kernel, stride=1):
    """A convolution that keeps the map's size (divided by the stride).

    No bias: a batch norm further on would subtract it again.
    """
    return nn.Conv2d(in_planes, planes, kernel, stride, padding=kernel // 2, bias=False)


class DropPath(nn.Module):
    """Stochastic depth of a residual branch, Huang et al. 2016 (arXiv 1603.09382), per sample.

    In training mode a sample's branch becomes 0 with probability `rate`; what is kept is divided by
    1 − rate, so that the expectation does not change.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


def drop_rates(last, blocks):
    """The drop-path rate of each block, from 0 for the first linearly to `last` for the last."""
    if not 0 <= last < 1:
        raise ValueError(f"drop_path must be at least 0 and below 1, not {last}.")
    return [last * i / max(1, blocks - 1) for i in range(blocks)]


# ---------------------------------------------------------------------------------------------
# ResNet
# ---------------------------------------------------------------------------------------------

class PadShortcut(nn.Module):
    """Option A of He et al.: halve the map, double the channels, no parameters."""

    def __init__(self, planes):
        super().__init__()
        self.pad = planes // 4  # half of the planes/2 channels that are missing

    def forward(self, x):
        x = x[:, :, ::2, ::2]  # (B, planes/2, H/2, W/2)
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad))  # (B, planes, H/2, W/2)


def projection(in_planes, planes, stride):
    """Option B of He et al.: a learned 1×1 convolution matches the shapes."""
    return nn.Sequential(conv(in_planes, planes, 1, stride), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""
    expansion = 1

    def __init__(self, in_planes, planes, stride, downsample, drop_path=0.0):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample  # None: the shortcut is the identity
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.drop_path(self.bn2(self.conv2(out))) + shortcut)


class Bottleneck(nn.Module):
    """1×1 to fewer channels, 3×3, 1×1 back to four times as many, and a shortcut around them."""
    expansion = 4

    def __init__(self, in_planes, planes, stride, downsample, drop_path=0.0):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        # The paper strides in conv1; a 1×1 convolution of stride 2 never looks at 3 pixels of 4,
        # so torchvision ("V1.5") and this file stride here.
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.drop_path(self.bn3(self.conv3(out))) + shortcut)


class ResNet(nn.Module):
    """Stem, stages layer1, layer2, ... that halve the map from the second on, mean, linear.

    large_images: the stem of the ImageNet networks, which makes the map four times smaller.
    """

    def __init__(self, block, depths, widths, num_classes, in_channels, option_a=False,
                 large_images=False, drop=0.0, drop_path=0.0):
        super().__init__()
        self.large_images = large_images
        self.conv1 = (conv(in_channels, widths[0], 7, 2) if large_images
                      else conv(in_channels, widths[0], 3))
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(depths)
        in_planes, rates = widths[0], iter(drop_rates(drop_path, sum(depths)))
        for i, (depth, width) in enumerate(zip(depths, widths)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                planes = width * block.expansion
                downsample = None
                if stride != 1 or in_planes != planes:
                    downsample = (PadShortcut(planes) if option_a
                                  else projection(in_planes, planes, stride))
                blocks.append(block(in_planes, width, stride, downsample, next(rates)))
                in_planes = planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(in_planes, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.large_images:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.drop(x.mean((2, 3))))  # (B, planes, h, w) -> (B, planes) -> logits


def resnet_option_a(depth, num_classes, in_channels):
    """The CIFAR ResNets of He et al. section 4.2: depth = 6n + 2, n blocks in each stage."""
    n = (depth - 2) // 6
    model = ResNet(BasicBlock, (n, n, n), (16, 32, 64), num_classes, in_channels, option_a=True)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight)  # σ² = 2 / fan_in
    return model


# The means over the map make every ResNet, WRN and DenseNet indifferent to the image's size.

def resnet20(num_classes=10, in_channels=3, image_size=32):
    return resnet_option_a(20, num_classes, in_channels)


def resnet32(num_classes=10, in_channels=3, image_size=32):
    return resnet_option_a(32, num_classes, in_channels)


def resnet44(num_classes=10, in_channels=3, image_size=32):
    return resnet_option_a(44, num_classes, in_channels)


def resnet56(num_classes=10, in_channels=3, image_size=32):
    return resnet_option_a(56, num_classes, in_channels)


def resnet110(num_classes=10, in_channels=3, image_size=32):
    return resnet_option_a(110, num_classes, in_channels)


# These three keep PyTorch's default initialisation.

def resnet18_cifar(num_classes=10, in_channels=3, image_size=32):
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes, in_channels)


def resnet34_cifar(num_classes=10, in_channels=3, image_size=32):
    return ResNet(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, in_channels)


def resnet50_cifar(num_classes=10, in_channels=3, image_size=32):
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, in_channels)


# ---------------------------------------------------------------------------------------------
# Wide ResNet
# ---------------------------------------------------------------------------------------------

class WideBlock(nn.Module):
    """Pre-activation block: norm and ReLU come before each convolution, none after the sum."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.shortcut = None if in_planes == planes else conv(in_planes, planes, 1, stride)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        # A learned shortcut starts from the activated input, the identity from the raw one.
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class WideResNet(nn.Module):
    """depth = 6n + 4: three stages of n blocks, `widen` times as wide as a ResNet's."""

    def __init__(self, depth, widen, num_classes, in_channels):
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv(in_channels, 16, 3)
        self.layer1 = self.stage(n, 16, 16 * widen, 1)
        self.layer2 = self.stage(n, 16 * widen, 32 * widen, 2)
        self.layer3 = self.stage(n, 32 * widen, 64 * widen, 2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def stage(n, in_planes, planes, stride):
        blocks = [WideBlock(in_planes, planes, stride)]
        blocks += [WideBlock(planes, planes, 1) for _ in range(n - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))  # the last block leaves the sum unactivated
        return self.fc(x.mean((2, 3)))


def wrn28_10(num_classes=10, in_channels=3, image_size=32):
    return WideResNet(28, 10, num_classes, in_channels)


# ---------------------------------------------------------------------------------------------
# DenseNet
# ---------------------------------------------------------------------------------------------

class DenseLayer(nn.Module):
    """Appends `growth` new channels to all those that came before."""

    def __init__(self, in_planes, growth):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, 4 * growth, 1)  # keeps the 3×3 convolution cheap
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth, 3)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], dim=1)  # (B, growth + in_planes, H, W), the new ones first


class Transition(nn.Module):
    """Between two dense stages: half the channels, half the map."""

    def __init__(self, in_planes):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_planes)
        self.conv = conv(in_planes, in_planes // 2, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Four dense stages with three transitions in between."""

    def __init__(self, depths, growth, num_classes, in_channels):
        super().__init__()
        planes = 2 * growth
        self.conv1 = conv(in_channels, planes, 3)
        self.features = nn.Sequential()  # dense1, trans1, dense2, ..., dense4
        for i, depth in enumerate(depths):
            dense = [DenseLayer(planes + j * growth, growth) for j in range(depth)]
            self.features.add_module(f"dense{i + 1}", nn.Sequential(*dense))
            planes += depth * growth
            if i < len(depths) - 1:
                self.features.add_module(f"trans{i + 1}", Transition(planes))
                planes //= 2
        self.bn = nn.BatchNorm2d(planes)
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.features(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def densenet121_cifar(num_classes=10, in_channels=3, image_size=32):
    return DenseNet((6, 12, 24, 16), 32, num_classes, in_channels)


# ---------------------------------------------------------------------------------------------
# VGG and LeNet
# ---------------------------------------------------------------------------------------------

class VGG(nn.Module):
    """3×3 convolutions with batch norm, five max-pools, three linear layers."""

    def __init__(self, widths, num_classes, in_channels):
        super().__init__()
        layers, planes = [], in_channels
        for width in widths:
            if width == "pool":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # 28, 14, 7, 4, 2, 1
                continue
            # The norm makes the bias redundant; MAC's CIFAR-100 experiments have it all the same.
            layers += [nn.Conv2d(planes, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            planes = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(planes, 512), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):  # σ² = 2 / (9·width)
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def forward(self, x):
        x = self.features(x)  # (B, 512, 1, 1) for images of 32 and of 28 pixels
        return self.classifier(x.mean((2, 3)))


def vgg16_bn_cifar(num_classes=10, in_channels=3, image_size=32):
    widths = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool",
              512, 512, 512, "pool", 512, 512, 512, "pool")
    return VGG(widths, num_classes, in_channels)


class LeNet5(nn.Module):
    """Two convolutions and three linear layers."""

    def __init__(self, num_classes, in_channels, padding):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def lenet5(num_classes=10, in_channels=3, image_size=32):
    if image_size not in (28, 32):
        raise ValueError(f"lenet5 takes images of 28 or 32 pixels, not image_size={image_size}.")
    # LeCun centred the 28×28 digits in 32×32; padding does the same here.
    return LeNet5(num_classes, in_channels, padding=2 if image_size == 28 else 0)


# ---------------------------------------------------------------------------------------------
# Vision transformer
# ---------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Cuts the image into squares and maps each to a vector: a convolution that never overlaps."""

    def __init__(self, patch, dim, in_channels):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h·w, D), row-major


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one linear layer.

    causal: a token sees itself and what came before it. dropout: of the attention's weights.
    """

    def __init__(self, dim, heads, bias=True, causal=False, dropout=0.0):
        super().__init__()
        self.num_heads, self.causal, self.dropout = heads, causal, dropout
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, attn_mask=None):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal, scale=self.scale)
        out = out.transpose(1, 2).reshape(B, T, D)  # the heads side by side again
        return self.proj(out)


class Mlp(nn.Module):
    """Two linear layers applied to each token by itself."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)  # drawn anew for each of the two branches

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patches and one class token through `depth` blocks; the class token is classified."""

    def __init__(self, img_size, patch, dim, depth, heads, num_classes, in_channels,
                 drop=0.0, drop_path=0.0):
        super().__init__()
        if img_size % patch:
            raise ValueError(f"Patches of {patch} pixels do not tile images of {img_size} pixels.")
        self.img_size = img_size
        tokens = (img_size // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.patch_embed = PatchEmbed(patch, dim, in_channels)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, rate) for rate in drop_rates(drop_path, depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(dim, num_classes)

        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)
        for m in self.modules():  # the patch convolution keeps PyTorch's default, as in timm
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        check_size(x, self.img_size)
        x = self.patch_embed(x)  # (B, T-1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, T, D)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.drop(self.norm(x)[:, 0]))


def check_size(x, img_size):
    """Raise ValueError for images of another size than the transformer was built for."""
    if x.shape[-2:] != (img_size, img_size):
        raise ValueError(f"This network was built for images of {img_size}×{img_size} pixels, "
                         f"not {x.shape[-2]}×{x.shape[-1]}.")


def vit_nano_cifar(num_classes=10, in_channels=3, image_size=32):
    return VisionTransformer(image_size, 4, 64, 4, 2, num_classes, in_channels)


def deit_tiny_cifar(num_classes=10, in_channels=3, image_size=32):
    return VisionTransformer(image_size, 4, 192, 12, 3, num_classes, in_channels)


# ---------------------------------------------------------------------------------------------
# Swin
# ---------------------------------------------------------------------------------------------

def split_windows(x, window):
    """A map (B, H, W, C) as (B·windows, window², C), images slowest, everything row by row."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, H/w, w, W/w, w, C)
    return x.transpose(2, 3).reshape(-1, window ** 2, x.shape[-1])


def join_windows(x, window, height, width):
    """The inverse of split_windows: (B·windows, window², C) as a map (B, height, width, C)."""
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def shift_mask(side, window, shift):
    """What shifted windows add to their attention scores: (windows, window², window²), 0 or −100.

    A map that was rolled by −shift has its former first rows and columns at its end. There they
    share windows with pixels that are no neighbours of theirs, and must not attend to them.
    """
    t = torch.arange(side)
    band = (t >= side - window).int() + (t >= side - shift).int()  # 0, 1, 2 along one side
    region = (3 * band[:, None] + band)[None, :, :, None]          # (1, side, side, 1)
    region = split_windows(region, window).squeeze(2)              # (windows, window²)
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


class WindowAttention(Attention):
    """Attention within a window: the scores get a bias learned for each relative position.

    x (B·windows, window², D), mask None or (windows, window², window²), added to the scores. The
    tables need no place in a state dict: they follow from the window.
    """

    def __init__(self, dim, heads, window):
        super().__init__(dim, heads)
        span = 2 * window - 1  # differences from -(window - 1) to window - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span ** 2, heads))
        y, x = torch.arange(window ** 2) // window, torch.arange(window ** 2) % window
        index = (y[:, None] - y + window - 1) * span + x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x, mask=None):
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
        bias = bias.permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return super().forward(x, bias)  # bias (B·windows or 1, heads, N, N)


class SwinBlock(nn.Module):
    """Pre-norm block on a map (B, side, side, D), with attention inside windows, shifted or not."""

    def __init__(self, dim, heads, side, window, shift, drop_path):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        mask = shift_mask(side, window, shift) if shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def attend(self, x):
        height, width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = self.attn(split_windows(x, self.window), self.attn_mask)
        x = join_windows(x, self.window, height, width)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2×2 square of a map becomes one token of twice the width: half the map's side."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # column by column
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """Merging, except in the first stage, then blocks whose windows are shifted every second."""

    def __init__(self, dim, heads, side, window, rates, merge):
        super().__init__()
        self.downsample = PatchMerging(dim // 2) if merge else nn.Identity()
        # one window that covers the map has nothing to be shifted against
        shift = window // 2 if side > window else 0
        self.blocks = nn.Sequential(
            *(SwinBlock(dim, heads, side, window, shift * (i % 2), rate)
              for i, rate in enumerate(rates)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class SwinPatchEmbed(nn.Module):
    """Squares of 4×4 pixels as normalised tokens, still laid out as a map (B, H/4, W/4, D)."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class MeanHead(nn.Module):
    """Mean over the map (B, H, W, D), dropout, linear."""

    def __init__(self, dim, num_classes, drop):
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x):
        return self.fc(self.drop(x.mean((1, 2))))


class SwinTransformer(nn.Module):
    """Liu et al. 2021: stages of window attention that halve the map and double the width.

    The window is as large as the last stage's map: 7 for images of 224 pixels and four stages, 12
    for 384, as published. So every multiple of 32 works, from 64 on; ValueError for other sizes.
    """

    def __init__(self, img_size, dim, depths, heads, num_classes, drop=0.0, drop_path=0.0):
        super().__init__()
        unit = 4 * 2 ** (len(depths) - 1)  # pixels along a side for each token of the last map
        if img_size % unit or img_size < 2 * unit:
            raise ValueError(f"Swin takes images of a multiple of {unit} pixels, at least "
                             f"{2 * unit}, not image_size={img_size}.")
        self.img_size, window = img_size, img_size // unit
        self.patch_embed = SwinPatchEmbed(dim)
        rates = drop_rates(drop_path, sum(depths))
        stages, side = [], img_size // 4
        for i, (depth, h) in enumerate(zip(depths, heads)):
            done = sum(depths[:i])
            stages.append(SwinStage(dim * 2 ** i, h, side // 2 ** i, window,
                                    rates[done:done + depth], merge=i > 0))
        self.layers = nn.Sequential(*stages)
        last = dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(last)
        self.head = MeanHead(last, num_classes, drop)

        for m in self.modules():  # the patch convolution keeps PyTorch's default, as in timm
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, WindowAttention):
                nn.init.normal_(m.relative_position_bias_table, std=0.02)

    def forward(self, x):
        check_size(x, self.img_size)
        return self.head(self.norm(self.layers(self.patch_embed(x))))


# ---------------------------------------------------------------------------------------------
# ImageNet
# ---------------------------------------------------------------------------------------------

def imagenet_resnet(block, depths, num_classes, drop, drop_path):
    """He et al. 2016, table 1; the last norm of a block starts at 1, as in torchvision."""
    model = ResNet(block, depths, (64, 128, 256, 512), num_classes, 3, large_images=True,
                   drop=drop, drop_path=drop_path)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet18(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return imagenet_resnet(BasicBlock, (2, 2, 2, 2), num_classes, drop, drop_path)


def resnet34(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return imagenet_resnet(BasicBlock, (3, 4, 6, 3), num_classes, drop, drop_path)


def resnet50(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return imagenet_resnet(Bottleneck, (3, 4, 6, 3), num_classes, drop, drop_path)


def resnet101(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return imagenet_resnet(Bottleneck, (3, 4, 23, 3), num_classes, drop, drop_path)


def resnet152(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return imagenet_resnet(Bottleneck, (3, 8, 36, 3), num_classes, drop, drop_path)


def deit_tiny_patch16_224(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return VisionTransformer(image_size or 224, 16, 192, 12, 3, num_classes, 3, drop, drop_path)


def deit_small_patch16_224(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return VisionTransformer(image_size or 224, 16, 384, 12, 6, num_classes, 3, drop, drop_path)


def deit_base_patch16_224(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return VisionTransformer(image_size or 224, 16, 768, 12, 12, num_classes, 3, drop, drop_path)


def swin_tiny_patch4_window7_224(num_classes=1000, image_size=None, drop=0.0, drop_path=0.0):
    return SwinTransformer(image_size or 224, 96, (2, 2, 6, 2), (3, 6, 12, 24), num_classes,
                           drop, drop_path)


# ---------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------

def load_pretrained(model, path):
    """Fill the model with the weights of a file from torchvision, timm or the papers' authors.

    The file is read with weights_only=True; it holds a state dict, or a dict with one under "model"
    or "state_dict". Every weight must be there in the model's shape, and nothing else.

    Raises OSError if the file cannot be opened, ValueError if it holds no state dict or another
    network's; the model is then as it was.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # which one depends on what the file is
        raise ValueError(f"{path} is damaged, not from torch.save, or holds more than weights: "
                         "torch.load(weights_only=True) refuses it.") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (isinstance(state, dict) and state
            and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, "
                         'at the top or under "model" or "state_dict".')
    if isinstance(model, SwinTransformer):
        state = swin_names(state)
    own = model.state_dict()
    for key in own:
        if key.endswith("num_batches_tracked"):  # old files do not count batches
            state.setdefault(key, own[key])
    check_fit(path, own, state)
    model.load_state_dict(state)


def swin_names(state):
    """A Swin state dict under this file's names, whichever of the two published layouts it has.

    The authors count a merging to the stage before it and call the classifier "head"; both layouts
    may hold the tables of WindowAttention and SwinBlock.
    """
    state = {key: value for key, value in state.items()
             if "relative_position_index" not in key and "attn_mask" not in key}
    if "head.fc.weight" in state:
        return state
    renamed = {}
    for key, value in state.items():
        merging = re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", key)
        if merging:
            key = f"layers.{int(merging[1]) + 1}.downsample.{merging[2]}"
        elif key.startswith("head."):
            key = "head.fc." + key.removeprefix("head.")
        renamed[key] = value
    return renamed


def check_fit(path, own, state):
    """Raise ValueError unless the state dict of the file has own's names and shapes."""
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    wrong = []
    for text, keys in (("lacks", missing), ("has the unknown", foreign)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            wrong.append(f"{text} {keys[0]}{more}")
    wrong += [f"has {key} of shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
              for key in shapes[:1]]
    if not wrong:
        return
    advice = "it seems to be another network's"
    if not missing and not foreign:
        if all(key.startswith(("fc.", "head.")) for key in shapes):
            advice = f"build the network with num_classes={len(state[shapes[0]])}, as in the file"
        elif all(key.endswith(("pos_embed", "relative_position_bias_table")) for key in shapes):
            advice = "build the network with the image size of the file"
    raise ValueError(f"{path} does not fit this network: it {', '.join(wrong)}; {advice}.")


# ---------------------------------------------------------------------------------------------
# GPT
# ---------------------------------------------------------------------------------------------

class CausalBlock(nn.Module):
    """Pre-norm transformer block of a language model; dropout on what each half adds."""

    def __init__(self, dim, heads, bias, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, bias=bias)
        self.attn = Attention(dim, heads, bias, causal=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, bias=bias)
        self.fc1 = nn.Linear(dim, 4 * dim, bias=bias)
        self.fc2 = nn.Linear(4 * dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """Tokens (B, T) to the logits of each next token, (B, T, vocabulary); T ≤ context.

    Radford et al. 2019 (GPT-2): learned positions, pre-norm blocks, a norm at the end. tied: the
    head's weight is the token embedding's, one Parameter and once in `parameters()`; `state_dict`
    has it under both names. Raises ValueError for a width that the heads do not divide, and for
    more tokens than the context.
    """

    def __init__(self, vocabulary, context, layers, heads, width, bias=True, tied=True,
                 dropout=0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}.")
        self.context = context
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, bias, dropout)
                                      for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight

        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "fc2.weight")):  # 2·layers of these add up
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens):
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"{T} tokens are more than the context of {self.context}.")
        x = self.wte(tokens) + self.wpe(torch.arange(T, device=tokens.device))  # (B, T, D)
        return self.head(self.norm(self.blocks(self.dropout(x))))


# minigpt is the size of AdaFisher's language models (whose embeddings were GPT-1's, frozen),
# nanogpt that of MAC's; char is for characters on a CPU.
GPT_SIZES = {
    "minigpt": dict(context=256, layers=4, heads=12, width=768),
    "gpt2_small": dict(context=1024, layers=12, heads=12, width=768),
    "nanogpt": dict(context=512, layers=8, heads=8, width=256, bias=False),
    "char": dict(context=64, layers=4, heads=4, width=128),
}


# ---------------------------------------------------------------------------------------------

CIFAR_MODELS = {make.__name__: make for make in (
    resnet20, resnet32, resnet44, resnet56, resnet110, resnet18_cifar, resnet34_cifar,
    resnet50_cifar, wrn28_10, densenet121_cifar, vgg16_bn_cifar, lenet5, vit_nano_cifar,
    deit_tiny_cifar)}

IMAGENET_MODELS = {make.__name__: make for make in (
    resnet18, resnet34, resnet50, resnet101, resnet152, deit_tiny_patch16_224,
    deit_small_patch16_224, deit_base_patch16_224, swin_tiny_patch4_window7_224)}
