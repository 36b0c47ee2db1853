"""models.py: sizes, names, initialisation, and outputs against other implementations."""
import functools
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import models
from testing import close, raises


# What `fingerprint` returns: y[0,0], y[0,1], y[0,2], y[1,-1], mean |y|. The numbers come from
# implementations other than models.py. One of a kind: the others differ in depth, width and number
# of heads, which the counts and test_imagenet_names see.
FINGERPRINTS = {
    "resnet20": (0.918351, 0.194464, 0.369263, -0.941033, 0.832829),
    "resnet18_cifar": (0.638495, -0.406179, 1.026136, 0.091764, 0.406093),
    "resnet50_cifar": (1.954760, -0.753208, 0.112891, 0.246879, 0.676258),
    "wrn28_10": (-0.024453, 0.877395, 0.795342, 0.236393, 0.480353),
    "densenet121_cifar": (0.063460, 0.173942, -0.150680, 0.127824, 0.135741),
    "vgg16_bn_cifar": (0.252997, 0.120395, -0.144100, -0.097183, 0.203575),
    "lenet5": (-0.763827, -0.257504, -0.625275, 0.478260, 0.516494),
    "deit_tiny_cifar": (-0.107676, 0.673924, 0.163721, -0.468856, 0.738040),
    "resnet50": (4.206032, -1.365415, 0.840450, -2.952219, 1.474549),
    "deit_tiny_patch16_224": (-0.194330, 0.937657, 0.031514, 0.351096, 0.820405),
    "swin_tiny_patch4_window7_224": (1.678393, -1.214601, -0.600787, 0.828446, 0.797933),
}
MODELS = models.CIFAR_MODELS | {name: make for name, make in models.IMAGENET_MODELS.items()
                                if not name.endswith("_test")}          # test_imagenet.py's


def fingerprint(model, in_channels=3, image_size=32):
    """Five numbers that change when an operation, an eps or the order of the parameters does.

    Parameter j is filled with normals of seed 1000 + j, so no weights need to be stored.
    """
    model.double().eval()
    with torch.no_grad():
        for j, (name, p) in enumerate(model.named_parameters()):
            z = np.random.RandomState(1000 + j).standard_normal(tuple(p.shape))
            if p.ndim >= 2:
                z /= np.sqrt(z[0].size)
            elif name.endswith("weight"):  # the scale of a normalisation
                z = 1 + 0.1 * z
            else:
                z *= 0.1
            p.copy_(torch.from_numpy(z))
        x = np.random.RandomState(0).standard_normal((2, in_channels, image_size, image_size))
        y = model(torch.from_numpy(x))
    return torch.stack([y[0, 0], y[0, 1], y[0, 2], y[1, -1], y.abs().mean()])


def test_counts():
    """The docstring's numbers of parameters; more classes change the last layer alone."""
    documented = re.findall(r"\d+(?:,\d{3})+", models.__doc__)
    for (name, make), want in zip(MODELS.items(), documented, strict=True):
        with torch.device("meta"):  # shapes without numbers
            model, larger = make(), make(num_classes=1234)
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, larger)]
        *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
        assert f"{counts[0]:,}" == want, name
        assert counts[1] - counts[0] == (1234 - last.out_features) * (last.in_features + 1), name


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints(name):
    size = 32 if name in models.CIFAR_MODELS else 224
    want = FINGERPRINTS[name]
    close(fingerprint(MODELS[name](), 3, size), want, 2e-6 / max(map(abs, want)))  # six decimals


def test_lenet5_of_28_pixels():
    close(fingerprint(models.lenet5(10, 1, 28), 1, 28),
          (-1.063370, 0.026562, -0.713122, 0.367319, 0.548571), 2e-6)


@pytest.mark.parametrize("name", models.CIFAR_MODELS)
def test_fashion_mnist(name):
    """Every network takes 1×28×28, and the gradient reaches every parameter."""
    model = models.CIFAR_MODELS[name](10, in_channels=1, image_size=28).eval()  # eval: no dropout
    logits = model(torch.randn(2, 1, 28, 28))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_option_a():
    x = torch.randn(2, 16, 7, 8, dtype=torch.float64)
    want = torch.zeros(2, 32, 4, 4, dtype=torch.float64)
    for c in range(16):
        for i in range(4):
            for j in range(4):
                want[:, 8 + c, i, j] = x[:, c, 2 * i, 2 * j]
    close(models.PadShortcut(32)(x), want, 0)


def test_initialisation():
    """As published, within four standard errors; torchvision does not zero a block's last norm."""
    resnet, vgg, deit = models.resnet20(), models.vgg16_bn_cifar(), models.deit_tiny_cifar()
    wrn, resnet18 = models.WideResNet(10, 4, 10, 3), models.resnet18()
    swin = models.SwinTransformer(56, 96, (2, 6), (3, 6), 10)           # windows of 7, as for 224
    gpt = models.GPT(300, 64, layers=3, heads=4, width=128)
    tables = [m.relative_position_bias_table.flatten() for m in swin.modules()
              if isinstance(m, models.WindowAttention)]
    for weight, want in (
            (resnet.layer3[0].conv1.weight, (2 / (9 * 32)) ** 0.5),     # √(2/fan_in)
            (resnet.fc.weight, (2 / 64) ** 0.5),
            (wrn.layer3[0].conv1.weight, (2 / (9 * 256)) ** 0.5),       # √(2/fan_out)
            (vgg.features[7].weight, (2 / (9 * 128)) ** 0.5),
            (resnet18.conv1.weight, (2 / (49 * 64)) ** 0.5),
            (resnet18.layer2[0].downsample[0].weight, (2 / 128) ** 0.5),
            (resnet18.fc.weight, (512 * 3) ** -0.5),                    # uniform ± 1/√fan_in
            (models.deit_tiny_patch16_224().patch_embed.proj.weight, (768 * 3) ** -0.5),
            (swin.patch_embed.proj.weight, (48 * 3) ** -0.5),
            *((weight, 0.02) for weight in (
                deit.blocks[0].attn.qkv.weight, deit.head.weight, deit.pos_embed, torch.cat(tables),
                swin.layers[1].blocks[5].mlp.fc1.weight, swin.layers[1].downsample.reduction.weight,
                gpt.wte.weight, gpt.wpe.weight, gpt.blocks[0].attn.qkv.weight,
                gpt.blocks[1].fc1.weight)),
            (gpt.blocks[1].attn.proj.weight, 0.02 / 6 ** 0.5),          # 0.02/√(2·layers)
            (gpt.blocks[2].fc2.weight, 0.02 / 6 ** 0.5)):
        close(weight.std() / want, 1.0, 4 / (2 * weight.numel()) ** 0.5)
    zeros = [wrn.fc.bias, vgg.features[7].bias, deit.head.bias, deit.blocks[0].mlp.fc1.bias,
             gpt.blocks[1].attn.qkv.bias, gpt.blocks[0].fc2.bias,
             *(m.bias for m in swin.modules() if isinstance(m, nn.Linear) and m.bias is not None)]
    assert not any(bias.any() for bias in zeros)
    assert all((m.weight == 1).all() for m in resnet18.modules() if isinstance(m, nn.BatchNorm2d))


def affine(name, out, *fan_in):
    return [(f"{name}.weight", (out, *fan_in)), (f"{name}.bias", (out,))]


def resnet_shapes(depths, bottleneck):
    """Names and shapes of a torchvision ResNet's state dict, in order."""
    def norm(name, n):
        running = [(f"{name}.running_mean", (n,)), (f"{name}.running_var", (n,))]
        return affine(name, n) + running + [(f"{name}.num_batches_tracked", ())]
    shapes, planes = [("conv1.weight", (64, 3, 7, 7))] + norm("bn1", 64), 64
    for stage, depth in enumerate(depths):
        width = 64 * 2 ** stage
        out = 4 * width if bottleneck else width
        for j in range(depth):
            block = f"layer{stage + 1}.{j}"
            kernels = [(width, planes, 1, 1), (width, width, 3, 3), (out, width, 1, 1)] \
                if bottleneck else [(width, planes, 3, 3), (width, width, 3, 3)]
            for k, kernel in enumerate(kernels, 1):
                shapes.append((f"{block}.conv{k}.weight", kernel))
                shapes += norm(f"{block}.bn{k}", kernel[0])
            if planes != out:
                shapes.append((f"{block}.downsample.0.weight", (out, planes, 1, 1)))
                shapes += norm(f"{block}.downsample.1", out)
            planes = out
    return shapes + affine("fc", 1000, planes)


def transformer_block(name, D, table=()):
    """A pre-norm block of timm's; table: the shape of Swin's relative position bias."""
    return [*affine(f"{name}.norm1", D),
            *([(f"{name}.attn.relative_position_bias_table", table)] if table else []),
            *affine(f"{name}.attn.qkv", 3 * D, D), *affine(f"{name}.attn.proj", D, D),
            *affine(f"{name}.norm2", D),
            *affine(f"{name}.mlp.fc1", 4 * D, D), *affine(f"{name}.mlp.fc2", D, 4 * D)]


def deit_shapes(D):
    shapes = [("cls_token", (1, 1, D)), ("pos_embed", (1, 197, D))]
    shapes += affine("patch_embed.proj", D, 3, 16, 16)
    for i in range(12):
        shapes += transformer_block(f"blocks.{i}", D)
    return shapes + affine("norm", D) + affine("head", 1000, D)


def swin_shapes():
    shapes = affine("patch_embed.proj", 96, 3, 4, 4) + affine("patch_embed.norm", 96)
    for stage, (D, heads, depth) in enumerate(zip((96, 192, 384, 768), (3, 6, 12, 24),
                                                  (2, 2, 6, 2))):
        if stage > 0:
            shapes += affine(f"layers.{stage}.downsample.norm", 2 * D)
            shapes.append((f"layers.{stage}.downsample.reduction.weight", (D, 2 * D)))
        for i in range(depth):
            shapes += transformer_block(f"layers.{stage}.blocks.{i}", D, (13 ** 2, heads))
    return shapes + affine("norm", 768) + affine("head.fc", 1000, 768)


IMAGENET_SHAPES = {
    "resnet18": resnet_shapes((2, 2, 2, 2), False),
    "resnet34": resnet_shapes((3, 4, 6, 3), False),
    "resnet50": resnet_shapes((3, 4, 6, 3), True),
    "resnet101": resnet_shapes((3, 4, 23, 3), True),
    "resnet152": resnet_shapes((3, 8, 36, 3), True),
    "deit_tiny_patch16_224": deit_shapes(192),
    "deit_small_patch16_224": deit_shapes(384),
    "deit_base_patch16_224": deit_shapes(768),
    "swin_tiny_patch4_window7_224": swin_shapes(),
}


@pytest.mark.parametrize("name", IMAGENET_SHAPES)
def test_imagenet_names(name):
    """Names, shapes and order of the state dicts, and the width of a head."""
    with torch.device("meta"):
        model = models.IMAGENET_MODELS[name]()
    state = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert state == IMAGENET_SHAPES[name]
    for m in model.modules():
        if isinstance(m, models.Attention):
            width = 32 if "swin" in name else 64
            assert (m.qkv.in_features / m.num_heads, m.scale) == (width, width ** -0.5)


def empty(name, **options):
    """The network with memory but without numbers: its initialisation is not what is tested."""
    with torch.device("meta"):
        model = models.IMAGENET_MODELS[name](**options)
    return model.to_empty(device="cpu")


def numbered(name):
    """A published state dict whose j-th tensor is full of j; one number of memory each."""
    return {key: torch.tensor(j).to(torch.int64 if shape == () else torch.float32).expand(shape)
            for j, (key, shape) in enumerate(IMAGENET_SHAPES[name])}


def of_authors(state):
    """Swin's state dict as its authors wrote it: mergings end a stage, head, tables."""
    renamed = {re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample",
                      key).replace("head.fc", "head"): value for key, value in state.items()}
    return renamed | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
                      "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}


RESNET, DEIT, SWIN = "resnet18", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("name, wrap", (
    (RESNET, lambda state: state), (DEIT, lambda state: {"model": state}),
    (RESNET, lambda state: {key: x for key, x in state.items() if "num_batches" not in key}),
    (SWIN, lambda state: {"state_dict": state}),
    (SWIN, lambda state: {"model": of_authors(state)})),
    ids=("torchvision", "DeiT", "torchvision, old", "timm", "Swin's authors"))
def test_load_pretrained(name, wrap, tmp_path):
    """Files of others, in their wrappers, tensor by tensor."""
    state, model = numbered(name), empty(name)
    torch.save(wrap(state), tmp_path / "weights.pth")
    models.load_pretrained(model, tmp_path / "weights.pth")
    for key, value in model.state_dict().items():
        assert (value == state[key]).all() or "num_batches" in key, key


def test_load_pretrained_refuses(tmp_path):
    """One sentence for what does not fit, and a model that keeps its weights."""
    resnet, deit, path = numbered(RESNET), numbered(DEIT), str(tmp_path / "weights.pth")
    small = empty(DEIT, num_classes=10)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    for words, model, content in (
            (["head.weight", "(1000, 192)", "(10, 192)", "num_classes=1000"], small, deit),
            (["pos_embed", "(1, 197, 192)", "(1, 17, 192)", "image size"],
             empty(DEIT, image_size=64), deit),
            (["layer1.2.conv1.weight and 79 more", "another network"], empty("resnet34"), resnet),
            (["unknown head_dist.weight", "another network"], small,
             deit | {"head_dist.weight": torch.zeros(1)}),
            (["no state dict"], small, [1, 2]), (["no state dict"], small, {"model": {"epoch": 3}}),
            (["more than weights"], small, {"model": deit, "args": functools.partial(print)})):
        torch.save(content, path)
        raises(ValueError, [path, *words], lambda: models.load_pretrained(model, path))
    assert all(torch.equal(value.view(torch.int32), before[key].view(torch.int32))
               for key, value in small.state_dict().items()), "nothing was loaded"
    (tmp_path / "weights.pth").write_text("<html>404</html>")
    raises(ValueError, [path, "damaged"], lambda: models.load_pretrained(small, path))
    raises(FileNotFoundError, ["nowhere"],
           lambda: models.load_pretrained(small, str(tmp_path / "nowhere")))


def test_drop_path():
    """Whole samples are dropped, the expectation stays, the rate grows linearly with depth."""
    drop, n = models.DropPath(0.3), 20_000
    x = torch.ones(n, 2, 1, 3, dtype=torch.float64)
    y = drop(x)
    close(y, y[:, :1, :, :1].expand_as(y), 0)
    close(y.unique(), torch.tensor([0, 1 / 0.7]), 1e-7)
    close(y.mean(), 1.0, 4 * (0.3 / 0.7 / n) ** 0.5)
    close(drop.eval()(x), x, 0)
    for name, depth in (("resnet18", 8), ("deit_tiny_patch16_224", 12),
                        ("swin_tiny_patch4_window7_224", 12)):
        with torch.device("meta"):
            model = models.IMAGENET_MODELS[name](drop_path=0.2)
        rates = [m.rate for m in model.modules() if isinstance(m, models.DropPath)]
        close(rates, np.linspace(0, 0.2, depth), 1e-15)
        raises(ValueError, ["drop_path", "1.5"],
               lambda: models.IMAGENET_MODELS[name](drop_path=1.5))
    # at a rate that keeps nothing, what is left of a block is its shortcut
    never = 1 - 1e-12
    for title, block, x, shape in (
            ("BasicBlock", models.BasicBlock(4, 4, 1, None, never), F.relu, (2, 4, 5, 5)),
            ("Bottleneck", models.Bottleneck(8, 2, 1, None, never), F.relu, (2, 8, 5, 5)),
            ("Block", models.Block(8, 2, never), nn.Identity(), (2, 5, 8)),
            ("SwinBlock", models.SwinBlock(8, 2, 6, 3, 1, never), nn.Identity(), (2, 6, 6, 8))):
        x = x(torch.randn(shape))
        close(block(x), x, 0)
        assert not torch.equal(block.eval()(x), x), title


@pytest.mark.parametrize("name, layer, size", [
    (RESNET, "fc", 40), (DEIT, "head", 48), (SWIN, "head.fc", 64)])
def test_imagenet_options(name, layer, size):
    """Dropout right before the classifier; image sizes other than 224, and those refused."""
    model = models.IMAGENET_MODELS[name](7, size, drop=1.0)
    x, bias = torch.randn(2, 3, size, size), model.get_submodule(layer).bias
    close(model(x), bias.expand(2, 7), 0)
    y = model.eval()(x)
    assert not torch.equal(y[0], y[1]), "no dropout in evaluation"
    if name != RESNET:
        raises(ValueError, [f"{size}×{size}", "64×96"], lambda: model(torch.zeros(1, 3, 64, 96)))


@pytest.mark.parametrize("name, size", [("lenet5", 64), ("deit_tiny_cifar", 30), (DEIT, 100),
                                        (SWIN, 100), (SWIN, 32)])
def test_refused_sizes(name, size):
    raises(ValueError, [str(size)], lambda: MODELS[name](image_size=size))


def test_dropout_of_gpt():
    """Of the embeddings, of what each half of a block adds, and of the attention's weights."""
    gpt = models.GPT(7, 5, layers=2, heads=2, width=8, dropout=0.25)
    rates = [m.p for m in gpt.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25] * 3 and gpt.blocks[1].attn.dropout == 0.25
    attention, x = models.Attention(8, 2, dropout=1.0), torch.randn(2, 3, 8)
    close(attention(x), attention.proj.bias.expand(2, 3, 8), 0)
    y = attention.eval()(x)
    assert not torch.equal(y[0], y[1]), "no dropout in evaluation"
