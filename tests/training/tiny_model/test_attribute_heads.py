from __future__ import annotations

import pytest
import torch

from proteus_deploy.training.tiny_model.attribute_heads import (
    AttributeHeads,
    label_table,
    same_first_weights,
)
from proteus_deploy.training.tiny_model.descriptions import (
    ATTRIBUTES,
    UNKNOWN,
    attribute_labels,
    describe_clip,
)


def _labels(**known: int) -> torch.Tensor:
    return label_table([dict.fromkeys(ATTRIBUTES, UNKNOWN) | known])


def test_guessing_costs_one() -> None:
    heads = AttributeHeads(4, ["kind", "clothes"])
    with torch.no_grad():
        heads.linear.weight.zero_()
        heads.linear.bias.zero_()
    loss = heads.loss(torch.randn(1, 4), _labels(kind=1, clothes=5))
    assert loss.item() == pytest.approx(1.0)


def test_each_attribute_reads_its_own_column() -> None:
    heads = AttributeHeads(3, ["clothes", "kind"])
    with torch.no_grad():
        heads.linear.weight.zero_()
        heads.linear.bias.zero_()
        heads.linear.bias[2] = 50.0  # clothes: the third colour
        heads.linear.bias[len(ATTRIBUTES["clothes"]) + 1] = 50.0  # kind: man
    features = torch.zeros(1, 3)
    assert heads.accuracies(features, _labels(clothes=2, kind=1)) == {"clothes": 1.0, "kind": 1.0}
    assert heads.accuracies(features, _labels(clothes=1, kind=1)) == {"clothes": 0.0, "kind": 1.0}
    assert heads.loss(features, _labels(clothes=2, kind=1)).item() == pytest.approx(0.0, abs=1e-12)


def test_unknown_labels_teach_nothing() -> None:
    heads = AttributeHeads(4, ["kind", "clothes"])
    features = torch.randn(1, 4, requires_grad=True)
    loss = heads.loss(features, _labels())
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_the_loss_is_a_mean_over_the_known() -> None:
    heads = AttributeHeads(4, ["kind"])
    features = torch.randn(3, 4)
    one = _labels(kind=1)
    both = torch.cat([one, _labels(), one])
    expected = (heads.loss(features[:1], one) + heads.loss(features[2:], one)) / 2
    assert heads.loss(features, both).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_table_is_in_the_order_of_the_attributes() -> None:
    labels = attribute_labels(describe_clip(1000, 0))
    shuffled = dict(sorted(labels.items(), reverse=True))
    assert label_table([shuffled])[0].tolist() == [labels[name] for name in ATTRIBUTES]


def test_first_weights_depend_on_the_seed_alone() -> None:
    def made(seed: int) -> torch.Tensor:
        with same_first_weights(seed):
            return torch.nn.Linear(3, 3).weight.detach()

    torch.manual_seed(1)
    first = made(5)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after, "the caller's random numbers were used up"
    assert torch.equal(made(5), first)
    assert not torch.equal(made(6), first)
