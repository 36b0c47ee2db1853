"""Networks of torchvision and timm: is every statistic right, on models not made for this project?

    python test_zoo.py                      # the table, for both libraries, all families
    pytest test_zoo.py                      # a few of them; skipped where neither is installed

Each network is built without pretrained weights, as small as its family allows, and takes two
training steps on two random images with each optimizer (tcov = tinv = 1). Rows that were captured
must reproduce the gradient: Σ g aᵀ = W.grad for each layer that is listed (ROWS below). The share
listed by print(optimizer) is that of the layers with statistics.
"""
import argparse
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from optimizer import PreconditionedSGD
from patches import pad
from testing import OPTIMIZERS

FAMILIES = {
    "torchvision": """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet
        inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf
        regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t
        swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2""".split(),
    "timm": """bat_resnext26ts beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny
        coatnet_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto
        convnextv2_atto crossvit_tiny_240 cs3darknet_s cspresnet50 darknet53 davit_tiny
        deit3_small_patch16_224 deit_tiny_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b
        eca_nfnet_l0 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
        efficientnet_lite0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224
        fastvit_t8 fbnetc_100 flexivit_small focalnet_tiny_srf gcresnet33ts gcvit_xxtiny
        gernet_s ghostnet_100 gmlp_s16_224 halonet26t hardcorenas_a haloregnetz_b hgnet_tiny
        hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_tiny inception_v4 lambda_resnet26t
        lamhalobotnet50ts_256 lcnet_050 levit_128s maxvit_nano_rw_256 maxxvit_rmlp_nano_rw_256
        mixer_s32_224 mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050
        mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge
        nest_tiny nextvit_small nf_regnet_b0 nf_resnet50 pit_ti_224 poolformer_s12
        poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_c16 regnetv_040
        repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d resnet18
        resnetblur50 resnetv2_50 resnetv2_50x1_bit resnext50_32x4d rexnet_100 rexnetr_200
        sebotnet33ts_256 sehalonet33ts selecsls42 semnasnet_050 sequencer2d_s seresnet18
        skresnet18 spnasnet_100 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224
        swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256 tf_efficientnet_b0 tf_efficientnetv2_b0
        tf_mixnet_s tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224
        tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny
        vit_base_patch16_rope_224 vit_relpos_small_patch16_224 vit_small_patch16_224
        vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41
        xcit_nano_12_p16_224""".split(),
}


class Rows(PreconditionedSGD):
    """Preconditions nothing: sums g aᵀ over the rows that it is shown."""

    kinds = dict.fromkeys(("linear", "projection", "conv"), "rows")
    needs_gradients = True

    def __init__(self, model, params=None, damping=1.0, stat_decay=0.0, tcov=1, tinv=1):
        super().__init__(locals())

    def set_up(self, layer):
        d = layer.d - (layer.bias is not None)
        layer.measured = {"gradient": (layer.blocks, layer.out // layer.blocks * d)}
        layer.prepared = {}

    def measure(self, layer, use):
        use.kept = use.x
        return {"gradient": use.x.new_zeros(1, 1, dtype=torch.float32).expand(
            layer.measured["gradient"])[use.blocks]}, use.rows

    def measure_gradient(self, layer, use, grad):
        x, grad = use.kept.float(), grad.float()
        if use.kind == "conv":
            shape = layer.weight.shape
            total = conv2d_weight(pad(x, use.geometry), shape, grad, use.geometry.stride, 0,
                                  use.geometry.dilation, use.geometry.groups)
        else:
            total = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        return {"gradient": total.reshape(len(range(layer.blocks)[use.blocks]), -1)}

    def errors(self):
        """{layer: relative error of Σ g aᵀ against W.grad} after a backward pass."""
        found = {}
        for layer, _ in self.grouped():
            if "gradient" in layer.pending and layer.weight.grad is not None:
                want = layer.weight.grad.mT if layer.transposed else layer.weight.grad
                got = layer.pending["gradient"][0].reshape(want.shape)
                found[layer.name] = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
        return found


def build(library, name):
    """The network in training mode without dropout, and a batch for it."""
    if library == "torchvision":
        models = pytest.importorskip("torchvision.models")
        size = {"inception_v3": 299}.get(name, 224)
        options = dict(init_weights=False) if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=None, **options)
    else:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, pretrained=False)
        size = model.pretrained_cfg["input_size"][-1] if hasattr(model, "pretrained_cfg") else 224
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, torch.nn.Linear) and module.in_features > 8000:
            module.requires_grad_(False)             # VGG's: its covariance would take minutes
    torch.manual_seed(0)
    return model.train(), torch.randn(2, 3, size, size), torch.tensor([1, 2])


def loss_of(model, x, y):
    out = model(x)
    out = out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out
    return F.cross_entropy(out, y)


def check(library, name):
    """(share listed, layers listed, layers in all, largest error, its layer, [what went wrong])."""
    model, x, y = build(library, name)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    rows = Rows(model)
    loss_of(model, x, y).backward()
    errors, wrong = rows.errors(), []
    worst = max(errors, key=errors.get, default="none")
    layers = len(rows.layers)
    del rows
    share = listed = 0
    for method, make in OPTIMIZERS.items():
        model.load_state_dict(start)
        try:
            optimizer = make(model, lr=1e-3, tcov=1, tinv=1)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()
            text = str(optimizer)
            with_statistics = sum(bool(s.get("updates")) for s in optimizer.state.values())
            count, percent = re.search(r"preconditioned: (\d+) weights, ([\d.]+)%", text).groups()
            if method == "foof":
                share, listed = float(percent), int(count)
            if int(count) != with_statistics:
                wrong.append(f"{method} lists {count}, has {with_statistics}")
            if not all(p.isfinite().all() for p in model.parameters()):
                wrong.append(f"{method}: not finite")
        except Exception as error:
            wrong.append(f"{method}: {type(error).__name__}: "
                         f"{' '.join(str(error).split())[:120]}")
        optimizer = None
    return share, listed, layers, errors.get(worst, 0.0), worst, wrong


@pytest.mark.parametrize("library, name", [
    ("torchvision", "swin_v2_t"), ("torchvision", "mobilenet_v3_small"),
    ("timm", "xcit_nano_12_p16_224"), ("timm", "resnetv2_50x1_bit"), ("timm", "levit_128s"),
    ("timm", "convnextv2_atto")])
def test_zoo(library, name):
    *_, error, layer, wrong = check(library, name)
    assert not wrong
    assert error < 1e-3, f"rows of {layer} do not reproduce its gradient"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="networks; default: all of FAMILIES")
    words = parser.parse_args().names
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}; share of all numbers that FOOF lists; error: largest of "
          "|Σ g aᵀ − W.grad| / |W.grad| over the layers\n"
          f"{'network':<44}{'share, %':>9}{'listed':>8}{'of':>6}{'error':>10}")
    bad = done = 0
    for library, names in FAMILIES.items():
        for name in names:
            if words and name not in words:
                continue
            try:
                share, listed, layers, error, layer, wrong = check(library, name)
            except Exception as error:
                print(f"{library + ' ' + name:<44} not built: {type(error).__name__}: "
                      f"{' '.join(str(error).split())[:60]}", flush=True)
                continue
            done, bad = done + 1, bad + bool(wrong or error > 1e-3)
            print(f"{library + ' ' + name:<44}{share:9.1f}{listed:8}{layers:6}{error:10.1e}"
                  + (f" ({layer})" if error > 1e-3 else "") + "".join(f"\n    {w}" for w in wrong),
                  flush=True)
    print(f"{done} networks, {bad} with something wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
