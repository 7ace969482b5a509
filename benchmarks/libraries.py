"""The libraries of networks that coverage is measured on: names, and how to build them with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

ROOT = Path(__file__).parents[1]
SEGMENTATION = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)
OPTIONS: dict[str, dict[str, object]] = {
    **{name: {"weights_backbone": None} for name in SEGMENTATION},
    **{name: {"init_weights": False} for name in ("googlenet", "inception_v3")},
}
"""GoogLeNet's and Inception's own initialisation takes half a minute; without it torch's, which suits ReLU, is left."""
PIXELS = {"inception_v3": 299}
"""Height and width of the images; all others take 224. Inception's auxiliary head does not fit below 299."""
OF_TIMM = """
beit_base_patch16_224 botnet26t_256 gernet_s cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_atto
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenetblur121d
dla34 dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mixnet_s efficientvim_m1 efficientvit_b0
efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_a
hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_s inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224 poolformer_s12 mixer_s32_224
lcnet_050 mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small nf_regnet_b0
pit_ti_224 pnasnet5large pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s
resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
vit_relpos_small_patch16_224 samvit_base_patch16 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim legacy_xception
xception41 xcit_nano_12_p8_224
"""
"""A small one of each of its modules, but of those whose smallest has more than 100 million parameters."""


@dataclass(frozen=True)
class Library:
    """`build` gives a network by its name, and the height and width of its images."""

    name: str
    title: str
    names: tuple[str, ...]
    build: Callable[[str], tuple[nn.Module, int]]
    results: Path
    document: Path


def _of_torchvision(name: str) -> tuple[nn.Module, int]:
    return torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {})), PIXELS.get(name, 224)


def _of_timm(name: str) -> tuple[nn.Module, int]:
    import timm

    model: Any = timm.create_model(name)
    return model, model.default_cfg["input_size"][1]


TORCHVISION, TIMM = (
    Library(
        "torchvision", "classifiers and semantic segmentation networks of torchvision",
        (*torchvision.models.list_models(module=torchvision.models), *SEGMENTATION), _of_torchvision,
        ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md",
    ),
    Library(
        "timm", "networks of timm, a small one of each of its modules (those whose smallest has more than 100 million "
        "parameters left out)",
        tuple(OF_TIMM.split()), _of_timm,
        ROOT / "benchmarks" / "results" / "coverage_timm.json", ROOT / "docs" / "coverage_timm.md",
    ),
)  # fmt: skip
LIBRARIES = {library.name: library for library in (TORCHVISION, TIMM)}
