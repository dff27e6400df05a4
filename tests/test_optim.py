"""The schedule and what is decayed."""

import pytest
import torch

from pacl_scale.optim import OptimConfig, build_optimizer, learning_rate


def test_warm_up_peak_and_end() -> None:
    settings = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(settings, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_more_warm_up_than_steps_never_exceeds_the_peak() -> None:
    settings = OptimConfig(lr=1.0, warmup_steps=100)
    assert max(learning_rate(settings, step, 10) for step in range(10)) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    module = torch.nn.Linear(3, 2)
    module.register_parameter("frozen", torch.nn.Parameter(torch.ones(4, 4), requires_grad=False))
    decay = {id(p): g["weight_decay"] for g in build_optimizer(OptimConfig(), module).param_groups for p in g["params"]}
    assert decay == {id(module.weight): 0.2, id(module.bias): 0.0}


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}, {"weight_decay": -0.1}])
def test_impossible_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**wrong)
