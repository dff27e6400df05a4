"""Every YAML file of configs/ is a configuration of its command, and only of differences."""

from pathlib import Path

import pytest

from data_prep.download import DownloadConfig
from data_prep.pack import PackConfig
from pacl_scale import config
from pacl_scale.cache import CacheConfig
from pacl_scale.evaluate.command import EvaluateConfig
from pacl_scale.submit import SubmitConfig
from pacl_scale.sweep.command import SweepConfig
from pacl_scale.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))


def class_of(path: Path) -> tuple[type, list[str]]:
    """The command's configuration class, and the words without which it does not run."""
    if path.parent.name == "data":
        if path.stem == "photos":
            return PackConfig, ["images=x", "captions=y", "output=z"]
        metadata = ["metadata=y"] if path.stem == "yfcc15m" else []
        return DownloadConfig, ["url_list=x", "output=z", *metadata]
    if path.parent.name == "eval":
        return EvaluateConfig, ["checkpoint=x"]
    classes = {"cache": CacheConfig, "train": TrainConfig, "clusters": SubmitConfig, "sweeps": SweepConfig}
    return classes[path.parent.name], []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_is_loaded(path: Path) -> None:
    config_class, words = class_of(path)
    loaded = config.parse(config_class, ["--config", str(path), *words], "test")
    assert config.to_dict(loaded)


def test_the_papers_recipe_is_the_papers() -> None:
    settings = config.parse(TrainConfig, ["--config", str(ROOT / "train" / "paper_b16.yaml")], "test")
    assert settings.global_batch_size == 4096
    assert (settings.optim.lr, settings.optim.betas, settings.optim.eps) == (5e-4, (0.9, 0.98), 1e-6)
    assert settings.optim.weight_decay == 0.2
    assert (settings.vision.model, settings.vision.weights) == ("ViT-B-16", "openai")
