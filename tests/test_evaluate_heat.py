"""Heat maps: what is bright, on which scale, and that they are the scores that the labels come from."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import install as install_towers
from colours import pixels, read_json, write_pictures, write_run
from PIL import Image

from pacl_scale.evaluate import main
from pacl_scale.evaluate.heat import heat_png, palette, small_size, word_maps
from pacl_scale.evaluate.labels import Lattice, View, label_pixels, merged
from pacl_scale.evaluate.protocol import Protocol


def test_values_are_scores_and_the_palette_grows_brighter() -> None:
    scores = np.linspace(-0.2, 0.4, 12).reshape(3, 4)
    picture = Image.open(io.BytesIO(heat_png(scores, -0.2, 0.4)))
    np.testing.assert_allclose(np.asarray(picture) / 255 * 0.6 - 0.2, scores, atol=0.6 / 255)
    brightness = palette().astype(int).sum(axis=1)
    assert (np.diff(brightness[::16]) > 0).all() and brightness[0] < 30
    assert np.asarray(Image.open(io.BytesIO(heat_png(scores, 0.1, 0.1)))).max() == 0


def test_maps_are_those_that_labels_come_from() -> None:
    lattice = Lattice(4, 2)
    maps = [(View(0, (16, 24), 0, 0, (16, 24)), torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0)))]
    found = word_maps(maps, [3, 0, 4, 1, 2], (20, 30), lattice)
    labels, _ = label_pixels(lambda portion: merged(maps, portion, (20, 30), lattice), 5, 600, Protocol())
    assert found.shape == (5, 20, 30)
    np.testing.assert_array_equal(np.array([3, 0, 4, 1, 2])[found.argmax(axis=0)], labels.numpy())


def test_small_sizes_keep_the_shape() -> None:
    assert small_size(500, 375) == (160, 120) and small_size(40, 30) == (40, 30) and small_size(4000, 1) == (160, 1)


def test_every_word_of_an_example_is_bright_where_it_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_towers(monkeypatch)
    data, run = write_pictures(tmp_path / "data"), write_run(tmp_path / "run")
    main([f"--checkpoint={run}", f'--segmentation={{"blocks": {{"root": "{data}"}}}}', "examples=1", "threads=1"])
    (folder,) = (run / "evals").glob("blocks-whole-*-examples")
    for example in read_json(folder / "examples.json")["examples"]:
        heat = example["heat"]
        assert heat["method"] == "pacl" and heat["low"] < 0.5 < heat["high"]
        truth = pixels(folder / example["files"]["truth"])
        for number, word in enumerate(example["words"][: example["truth_words"]]):
            values = pixels(folder / heat["files"][word])
            size = (values.shape[1], values.shape[0])
            place = np.array(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
            inside, outside = values[place == number], values[(place != number) & (place != 255)]
            assert np.median(inside) > np.median(outside) + 60
