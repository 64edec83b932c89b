from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from proteus_deploy.errors import InputError
from proteus_deploy.identity import IdentityFeatures


def make(batch: int = 1, keypoints: bool = False, tokens: int = 5, cond: int = 12) -> IdentityFeatures:
    points = torch.rand(5, 2) if batch == 1 else torch.rand(batch, 5, 2)
    return IdentityFeatures(
        torch.randn(batch, 1, cond),
        tuple(torch.randn(batch, tokens, 8) for _ in range(5)),
        points if keypoints else None,
    )


def test_a_list_of_states_becomes_a_tuple() -> None:
    states = [torch.zeros(2, 3, 4) for _ in range(5)]
    features = IdentityFeatures(torch.zeros(2, 1, 6), states)  # type: ignore[arg-type]
    states.clear()
    assert isinstance(features.id_vit_hidden, tuple)
    assert len(features.id_vit_hidden) == 5
    assert features.batch == 2


@pytest.mark.parametrize(
    ("cond", "states", "message"),
    [
        (torch.zeros(1, 6), [torch.zeros(1, 3, 4)] * 5, r"id_cond has shape \[1, 6\]; expected \[B, 1, C\]"),
        (torch.zeros(1, 2, 6), [torch.zeros(1, 3, 4)] * 5, "one vector a photo"),
        (torch.zeros(1, 1, 6).int(), [torch.zeros(1, 3, 4)] * 5, r"id_cond has dtype torch.int32"),
        (torch.full((1, 1, 6), torch.nan), [torch.zeros(1, 3, 4)] * 5, "6 values that are not finite"),
        (torch.zeros(1, 1, 6), [torch.zeros(1, 3, 4)] * 4, "has 4 tensors; expected 5"),
        (torch.zeros(1, 1, 6), [torch.zeros(3, 4)] * 5, r"id_vit_hidden\[0\] has shape \[3, 4\]"),
        (torch.zeros(2, 1, 6), [torch.zeros(1, 3, 4)] * 5, "id_cond holds 2 photos and id_vit_hidden 1"),
        (
            torch.zeros(1, 1, 6),
            [torch.zeros(1, 3, 4)] * 4 + [torch.zeros(1, 3, 5)],
            r"id_vit_hidden\[4\] has shape \[1, 3, 5\]",
        ),
        (
            torch.zeros(1, 1, 6),
            [torch.zeros(1, 3, 4)] * 4 + [torch.full((1, 3, 4), torch.inf)],
            r"id_vit_hidden\[4\] holds 12 values that are not finite",
        ),
        ([[0.0]], [torch.zeros(1, 3, 4)] * 5, "id_cond is a list; expected a float tensor"),
    ],
)
def test_wrong_tensors_are_refused(cond: torch.Tensor, states: list[torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IdentityFeatures(cond, tuple(states))


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (2, 5, 2), (10,)])
def test_wrong_keypoints_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"keypoints has shape .* expected \[5, 2\]"):
        IdentityFeatures(torch.zeros(1, 1, 6), tuple([torch.zeros(1, 3, 4)] * 5), torch.zeros(shape))


def test_to_converts_features_and_leaves_pixels() -> None:
    features = make(keypoints=True).to(torch.bfloat16)
    assert features.id_cond.dtype == torch.bfloat16
    assert {state.dtype for state in features.id_vit_hidden} == {torch.bfloat16}
    assert features.keypoints is not None
    assert features.keypoints.dtype == torch.float32
    with pytest.raises(InputError, match="int8"):
        features.to(torch.int8)


def test_stack_keeps_the_order() -> None:
    first, second = make(keypoints=True), make(keypoints=True)
    both = IdentityFeatures.stack([first, second])
    assert both.batch == 2
    assert both.keypoints is not None
    assert both.keypoints.shape == (2, 5, 2)
    assert torch.equal(both.id_cond[1:], second.id_cond)
    for joined, one, other in zip(both.id_vit_hidden, first.id_vit_hidden, second.id_vit_hidden, strict=True):
        assert torch.equal(joined, torch.cat([one, other]))
    assert IdentityFeatures.stack([make(), make(2)]).batch == 3


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no features"),
        ([make(), make(cond=13)], r"features\[1\].id_cond"),
        ([make(), make(tokens=6)], r"features\[1\].id_vit_hidden"),
        ([make(), make().to(torch.float16)], "one dtype"),
        ([make(), make(keypoints=True)], "1 of 2 features have keypoints"),
    ],
)
def test_stack_refuses_what_does_not_fit(items: list[IdentityFeatures], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IdentityFeatures.stack(items)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, proteus_deploy.identity.photo, proteus_deploy.identity.faces, "
        "proteus_deploy.identity.alignment, proteus_deploy.pickle_conversion, proteus_deploy.cli.convert\n"
        "print([name for name in ('torch', 'cv2', 'insightface', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
