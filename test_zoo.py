"""Networks of torchvision, timm and transformers: is every statistic right, on models not made for
this project?

    python test_zoo.py --into FILE          # the table of all families; resumes what FILE has
    pytest test_zoo.py                      # a few of them; skipped where none is installed

Each network is built without pretrained weights, as small as its family allows, and takes two
training steps on two random images or texts with each optimizer (tcov = tinv = 1). Rows that were
captured must reproduce the gradient: Σ g aᵀ = W.grad for each layer that is listed (Rows below).
The share listed by print(optimizer) is that of the layers with statistics.
"""
import argparse
import copy
import os
import re
import time
import warnings
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec

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
        convnextv2_atto cpubone_b0_bfrobust crossvit_tiny_240 cs3darknet_s csatv2 cspnext_s
        cspresnet50 darknet53 davit_tiny deit3_small_patch16_224 deit_tiny_patch16_224 densenet121
        dla34 dm_nfnet_f0 dpn48b eca_nfnet_l0 edgenext_xx_small efficientformer_l1
        efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvim_m1 efficientvit_b0
        efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100
        flexivit_small focalnet_tiny_srf gcresnet33ts gcvit_xxtiny gernet_s ghostnet_100
        gmlp_s16_224 halonet26t hardcorenas_a haloregnetz_b hgnet_tiny hgnetv2_b0 hiera_tiny_224
        hieradet_small hrnet_w18_small iformer_s inception_next_tiny inception_v4 lambda_resnet26t
        lamhalobotnet50ts_256 lcnet_050 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s
        lowformer_b0 mambaout_femto maxvit_nano_rw_256 maxxvit_rmlp_nano_rw_256 mixer_s32_224
        mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
        mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap
        nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nf_resnet50 pit_ti_224 poolformer_s12
        poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_c16 regnetv_040
        repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d resnet18
        resnetblur50 resnetv2_50 resnetv2_50x1_bit resnext50_32x4d rexnet_100 rexnetr_200
        samvit_base_patch16_224 sebotnet33ts_256 sehalonet33ts selecsls42 semnasnet_050
        sequencer2d_s seresnet18 shvit_s1 skresnet18 spnasnet_100 starnet_s1 swiftformer_xs
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
        tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_075
        tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small
        vgg11 visformer_tiny vit_base_patch16_rope_224 vit_relpos_small_patch16_224
        vit_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224
        volo_d1_224 vovnet39a wide_resnet50_2 xception41 xcit_nano_12_p16_224""".split(),
}
TASKS = {                  # of transformers: what AutoModelFor... gives for these families
    "CausalLM": """bloom falcon gemma2 gpt2 gpt_neox gpt_oss granitemoe jamba llama
        mamba mamba2 mixtral opt phi qwen2 qwen3_moe recurrent_gemma rwkv""".split(),
    "MaskedLM": """albert bert deberta-v2 distilbert electra longformer modernbert""".split(),
    "ImageClassification": "beit dinov2 mobilevit poolformer vit".split(),
    "Seq2SeqLM": "bart switch_transformers t5".split(),
    "SpeechSeq2Seq": ["whisper"],
    "AudioClassification": ["wav2vec2"],
}
FAMILIES["transformers"] = sum(TASKS.values(), [])
SMALL_VIT = dict(embed_dim=192, num_heads=3)
SMALLER = {                # what makes a network of more than 60 million parameters a small one
    "beit_base_patch16_224": SMALL_VIT, "naflexvit_base_patch16_gap": SMALL_VIT,
    "nasnetalarge": dict(stem_size=32, num_features=1152),
    "samvit_base_patch16_224": SMALL_VIT | dict(global_attn_indexes=(1,)),
    "vit_base_patch16_rope_224": SMALL_VIT,
}
SMALL_CONFIG = dict(       # of transformers' models; families call the same by several names
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, ffn_dim=64, d_inner=64, hidden_dim=64, d_ff=64, encoder_ffn_dim=64,
    decoder_ffn_dim=64, moe_intermediate_size=64, encoder_layers=2, decoder_layers=2,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, vocab_size=50, embedding_size=32,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=0, use_cache=False,
    image_size=64, attention_window=8)
SMALL_CONFIGS = {          # where families give the same another name
    "gemma2": dict(head_dim=8), "gpt_oss": dict(head_dim=8), "qwen3_moe": dict(head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=16),
    "wav2vec2": dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16,
                     num_conv_pos_embedding_groups=2),
    "whisper": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, max_source_positions=20),
}
WIDEST = 1300    # hidden weights with more inputs or outputs are frozen: they cost the cube of it
COLUMNS = "foof", "kfac", "adafisher"


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
    """The network in training mode, without dropout, and the call that gives its outputs."""
    pytest.importorskip(library)
    torch.manual_seed(0)
    model, forward = {"torchvision": torchvision_model, "timm": timm_model,
                      "transformers": transformers_model}[library](name)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for layer in [*Rows(model).layers.values()][:-1]:
        if max(layer.out // layer.blocks, layer.d) > WIDEST:
            layer.weight.requires_grad_(False)
    model.train()
    return model, forward


def torchvision_model(name):
    from torchvision import models
    size = {"inception_v3": 299, "maxvit_t": 224, "vit_b_32": 224}.get(name, 128)
    options = dict(init_weights=False) if name in ("googlenet", "inception_v3") else {}
    model, x = models.get_model(name, weights=None, **options), torch.randn(2, 3, size, size)
    return model, lambda: model(x)


def timm_model(name):
    """Of three blocks, and for images of 64² or 128² pixels, where these are options."""
    import timm
    options = dict(num_classes=100, **SMALLER.get(name, {}))
    for depth in (dict(depth=3), {}):
        for size in (64, 128, None):
            for sized in (dict(img_size=size), {}) if size else ({},):
                with suppress(Exception):
                    model = timm.create_model(name, **options, **depth, **sized)
                    size = size or model.pretrained_cfg["input_size"][-1]
                    x = torch.randn(2, 3, size, size)
                    with torch.no_grad():
                        model(x)
                    return model, lambda: model(x)
    return timm.create_model(name), None                  # for its own words about what is wrong


def transformers_model(name):
    import transformers
    task = next(task for task, names in TASKS.items() if name in names)
    config = transformers.AutoConfig.for_model(name, **SMALL_CONFIG | SMALL_CONFIGS.get(name, {}))
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    tokens = torch.randint(2, 50, (2, 16))
    arguments = {
        "ImageClassification": {"pixel_values": torch.randn(2, 3, 64, 64)},
        "Seq2SeqLM": {"input_ids": tokens, "decoder_input_ids": tokens},
        "SpeechSeq2Seq": {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens},
        "AudioClassification": {"input_values": torch.randn(2, 4000)},
    }.get(task, {"input_ids": tokens})
    return model, lambda: model(**arguments).logits


def loss_of(outputs):
    """Of all heads, auxiliary ones too; the labels are 0, 1, 2, ..."""
    heads = outputs if isinstance(outputs, tuple) else [outputs]
    heads = [head.flatten(0, -2) for head in heads if torch.is_tensor(head)]
    return sum(F.cross_entropy(head, torch.arange(len(head)) % head.shape[1]) for head in heads)


def check(library, name):
    """({method: share listed}, layers listed, layers in all, error, its layer, [what was wrong]).

    The share listed is compared with that of the layers that have statistics.
    """
    model, forward = build(library, name)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = copy.deepcopy(model.state_dict())
    rows = Rows(model)
    loss_of(forward()).backward()
    errors, wrong, shares, count = rows.errors(), {}, {}, 0
    worst = max(errors, key=errors.get, default="none")
    layers = sum(weight.requires_grad for weight in rows.layers)
    del rows
    for method, make in OPTIMIZERS.items():
        model.load_state_dict(start)
        optimizer = None
        try:
            optimizer = make(model, lr=1e-3, tcov=1, tinv=1)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(forward()).backward()
                optimizer.step()
            wrong |= faults(method, optimizer, trained)
            number, shares[method] = listed(optimizer)
            count = number if method == "foof" else count
        except Exception as error:
            wrong[method] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return (shares, count, layers, errors.get(worst, 0.0), worst,
            [f"{method}: {what}" for method, what in wrong.items()])


def listed(optimizer):
    """How many weights print(optimizer) lists, and the percentage of all numbers that they are."""
    count, percent = re.search(r"preconditioned: (\d+) weights, ([\d.]+)%",
                               str(optimizer)).groups()
    return int(count), float(percent)


def faults(method, optimizer, trained):
    """{method: what is not finite, or where the list differs from the statistics there are}."""
    count, percent = listed(optimizer)
    have = [layer for p, layer in optimizer.layers.items() if optimizer.state[p].get("updates")]
    share = 100 * sum(layer.out * layer.d for layer in have) / sum(p.numel() for p in trained)
    values = trained + [x for state in optimizer.state.values() for x in state.values()
                        if torch.is_tensor(x)]
    if not all(value.isfinite().all() for value in values):
        return {method: "not finite"}
    if count != len(have) or abs(share - percent) > 0.1:
        return {method: f"lists {count}, {percent}%; has {len(have)}, {share:.1f}%"}
    return {}


@pytest.mark.parametrize("library, name", [
    ("torchvision", "swin_v2_t"), ("torchvision", "mobilenet_v3_small"),
    ("timm", "xcit_nano_12_p16_224"), ("timm", "resnetv2_50x1_bit"), ("timm", "levit_128s"),
    ("timm", "convnextv2_atto"), ("transformers", "gpt2"), ("transformers", "mixtral")])
def test_zoo(library, name):
    *_, error, layer, wrong = check(library, name)
    assert not wrong
    assert error < 1e-3, f"rows of {layer} do not reproduce its gradient"


def header(libraries):
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", *libraries))
    return (f"""{versions}
foof, kfac, adafisher: percentage of all numbers that each preconditions (mac and nysact: foof's;
adafisherw: adafisher's); listed, of: weights that foof lists with statistics, and those there are;
error: largest of |Σ g aᵀ − W.grad| / |W.grad| over these; s: seconds of one CPU
{"network":<44}""" + "".join(f"{method:>10}" for method in COLUMNS)
            + f"{'listed':>8}{'of':>6}{'error':>10}{'s':>5}")


def row_of(library, name):
    start = time.process_time()
    try:
        shares, count, layers, error, layer, wrong = check(library, name)
    except Exception as error:
        return f"not built: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if error > 1e-3:
        wrong.append(f"rows of {layer} do not reproduce its gradient")
    return ("".join(f"{shares.get(method, -1):10.1f}" for method in COLUMNS)
            + f"{count:8}{layers:6}{error:10.1e}{time.process_time() - start:5.0f}"
            + "".join(f"\n    wrong: {w}" for w in wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="networks; default: all of FAMILIES")
    parser.add_argument("--into", default=os.devnull, metavar="FILE",
                        help="the table, which gets the rows that it lacks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    libraries = [name for name in FAMILIES if find_spec(name)]
    with open(args.into, "a+") as file:
        file.seek(0)
        known = file.read()
        if not known:
            print(header(libraries), file=file, flush=True)
        for library in libraries:
            for name in FAMILIES[library]:
                title = f"{library} {name}".ljust(44)
                if title not in known and (not args.names or name in args.names):
                    row = title + row_of(library, name)
                    print(row, flush=True)
                    print(row, file=file, flush=True)


if __name__ == "__main__":
    main()
