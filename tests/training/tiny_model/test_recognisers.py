"""The tiny recognisers: losses against their formulas, crops, files, and a short training of each kind."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from proteus_deploy.errors import InputError
from proteus_deploy.evaluate.ir_backbone import load_ir_backbone
from proteus_deploy.identity.faces import RECOGNISER_TEMPLATE
from proteus_deploy.testing import Tolerance, assert_close
from proteus_deploy.training.tiny_model.drawn_people import DrawnPeople, draw_people
from proteus_deploy.training.tiny_model.face_crops import (
    crop_batch,
    crops_as_input,
    draw_crop,
)
from proteus_deploy.training.tiny_model.fitting import step_generator
from proteus_deploy.training.tiny_model.margin_losses import Loss, MarginHead
from proteus_deploy.training.tiny_model.recognisers import (
    EMBEDDING_NORM,
    TINY_RECOGNISERS,
    RecogniserPlan,
    ResNetRecogniser,
    train_recogniser,
    write_recogniser,
)

ROUNDING = Tolerance(1e-4, "absolute", "float32 rounding of angles near 0 and pi")
# 1.5e-6 at most over four networks and three sets of pictures.
SAME_MATHS = Tolerance(3e-6, "relative", "float32 rounding; folding a batch norm reorders products")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> DrawnPeople:
    return draw_people(tmp_path_factory.mktemp("people"), 4, processes=1)


def at_angles(*angles: float) -> Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])


def head(kind: Loss, *centres: float) -> MarginHead:
    made = MarginHead(len(centres), 2, kind, scale=10.0, margin=0.3)
    with torch.no_grad():
        # Lengths don't count.
        made.centres.copy_(at_angles(*centres) * 3)
    return made


def test_arcface_widens_the_own_angle() -> None:
    # Two crops of two people, away from their centres by 0.2 and -0.4, 0.5 and 0.1.
    vectors = 7 * at_angles(0.2, 1.9, -0.4, 1.5)
    who = torch.tensor([0, 1, 0, 1])
    ours, among = head("arcface", 0.0, 1.4)(vectors, who)
    to_centres = [((0.2, 1.2), 0), ((1.9, 0.5), 1), ((0.4, 1.8), 0), ((1.5, 0.1), 1)]
    assert_close("centres", ours, by_hand(to_centres), ROUNDING)
    one, two = [((0.6, 1.3), 0), ((2.3, 0.4), 1)], [((0.6, 2.3), 0), ((1.3, 0.4), 1)]
    assert_close("batch", among, 0.5 * (by_hand(one) + by_hand(two)), ROUNDING)


def by_hand(rows: list[tuple[tuple[float, float], int]]) -> Tensor:
    """Mean cross entropy of 10 cos(angle), 0.3 added to the own angle."""
    terms = []
    for angles, own in rows:
        cosines = [math.cos(angle + (0.3 if place == own else 0)) for place, angle in enumerate(angles)]
        terms.append(math.log(sum(math.exp(10 * cosine) for cosine in cosines)) - 10 * cosines[own])
    return torch.tensor(sum(terms) / len(terms))


def test_without_a_margin_it_is_a_softmax_of_cosines() -> None:
    vectors, who = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2] * 2)
    made = head("arcface", 0.0, 2.0, 4.0)
    cosines = F.normalize(vectors) @ F.normalize(made.centres).T
    ours, _ = made(vectors, who, ease=0.0)
    assert_close("loss", ours, F.cross_entropy(10 * cosines, who), ROUNDING)


def test_the_loss_rises_with_the_angle_up_to_the_opposite_side() -> None:
    made = head("arcface", 0.0, 0.5 * math.pi)
    who = torch.tensor([0, 0])
    losses = []
    for angle in torch.linspace(0.05, math.pi - 0.01, 40).tolist():
        # The other class stays as far away as it was.
        with torch.no_grad():
            made.centres[1] = at_angles(angle + 1.0)[0]
        losses.append(float(made(at_angles(angle, angle), who)[0].detach()))
    assert all(after > before for before, after in pairwise(losses))


def test_curricularface_weighs_hard_classes_as_training_goes_on() -> None:
    vectors, who = at_angles(0.5, 0.5), torch.tensor([0, 0])

    def loss(made: MarginHead) -> Tensor:
        ours: Tensor = made(vectors, who)[0]
        return ours.detach()

    # Class 1 is nearer than the widened own one (hard), class 2 isn't.
    made = head("curricularface", 0.0, 0.9, 2.5).eval()
    made.difficulty.fill_(0.4)
    hard, easy = math.cos(0.4), math.cos(2.0)
    logits = 10 * torch.tensor([math.cos(0.8), hard * (0.4 + hard), easy])
    assert_close("hard", loss(made), F.cross_entropy(logits[None], who[:1]), ROUNDING)
    plain = loss(head("arcface", 0.0, 0.9, 2.5).eval())
    # At the start hard classes count less than they will, later more.
    made.difficulty.fill_(0.0)
    assert loss(made) < plain
    made.difficulty.fill_(0.9)
    assert loss(made) > plain
    loss(made.train())
    assert float(made.difficulty) != pytest.approx(0.9)
    before = float(made.difficulty)
    loss(made.eval())
    assert float(made.difficulty) == before


def test_crops_put_landmarks_on_the_template() -> None:
    marks = np.array([[30, 34], [48, 33], [39, 44], [32, 55], [47, 54]], np.float32)
    seen = np.zeros((5, 2))
    draw = np.random.default_rng(0)
    rounds = 40
    for point in range(5):
        image = np.zeros((96, 96, 3), np.uint8)
        x, y = marks[point].astype(int)
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
        for _ in range(rounds):
            light = draw_crop(image, marks, draw).astype(float).sum(axis=2)
            light = np.where(light > 0.6 * light.max(), light, 0)
            rows, columns = np.mgrid[:112, :112]
            seen[point] += np.array([(light * columns).sum(), (light * rows).sum()]) / light.sum() / rounds
    # The dots are no exact similarity of the template, and each crop is a little off on purpose.
    assert np.abs(seen - RECOGNISER_TEMPLATE).max() < 4
    assert np.abs((seen - RECOGNISER_TEMPLATE).mean(axis=0)).max() < 1


def test_a_batch_holds_two_pictures_of_each_person(people: DrawnPeople) -> None:
    crops, who = crop_batch(people, 8, step_generator(1, 2))
    again, _ = crop_batch(people, 8, step_generator(1, 2))
    assert crops.shape == (8, 3, 112, 112)
    assert -1 <= float(crops.min()) < float(crops.max()) <= 1
    assert torch.equal(who[:4], who[4:])
    assert len(set(who.tolist())) == 4
    assert torch.equal(crops, again)
    assert not torch.equal(crops[:4], crops[4:])
    assert not torch.equal(crops, crop_batch(people, 8, step_generator(1, 3))[0])


def test_the_onnx_file_computes_what_the_network_computes(tmp_path: Path, people: DrawnPeople) -> None:
    from insightface.model_zoo import get_model

    torch.manual_seed(0)
    network = ResNetRecogniser((4, 8, 8, 8), 6)
    crops, _ = crop_batch(people, 8, step_generator(0, 0))
    with torch.no_grad():
        for _ in range(80):
            network(crops)
        network.eval()
        # What training saw has the norm of the published recogniser's vectors.
        norm = float(network(crops).square().sum(dim=1).mean().sqrt())
    assert norm == pytest.approx(EMBEDDING_NORM, rel=0.1)
    file = write_recogniser(network, tmp_path / "recogniser.onnx")
    model = get_model(str(file), providers=["CPUExecutionProvider"])
    assert model.taskname == "recognition"
    pictures = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    # insightface takes BGR and turns it round.
    found = torch.from_numpy(model.get_feat([np.ascontiguousarray(p[..., ::-1]) for p in pictures]))
    with torch.no_grad():
        assert_close("vectors", found, network(crops_as_input(pictures)), SAME_MATHS)
    assert write_recogniser(network, tmp_path / "again.onnx").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "plan",
    [
        RecogniserPlan("a.onnx", "arcface", (8, 8, 8, 8), seed=1, steps=12, dim=8, batch=8),
        RecogniserPlan("b.safetensors", "curricularface", (4, 4, 8, 12), seed=2, steps=12, dim=8, batch=6),
    ],
    ids=lambda plan: plan.loss,
)
def test_training_lowers_the_loss_and_ends_in_a_file(tmp_path: Path, plan: RecogniserPlan) -> None:
    file = train_recogniser(tmp_path, plan, people=4, processes=1)
    stem = plan.name.partition(".")[0]
    log = (tmp_path / f"{stem}_training.log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["batch"] < 0.8 * json.loads(log[0])["batch"]
    if file.suffix == ".safetensors":
        vectors = load_ir_backbone(file)(torch.zeros(2, 3, 112, 112))
        assert vectors.shape == (2, 8)
    before = file.read_bytes()
    file.unlink()
    assert train_recogniser(tmp_path, plan, people=4, processes=1) == file
    assert file.read_bytes() == before


def test_an_ir_plan_that_no_reader_could_tell_is_refused(tmp_path: Path) -> None:
    """Where the channels stay, the weights don't say that the map is halved."""
    plan = RecogniserPlan("a.safetensors", "curricularface", (4, 4, 8, 8), seed=1, steps=1)
    with pytest.raises(InputError, match="8 channels twice"):
        train_recogniser(tmp_path, plan, people=2, processes=1)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    plan = RecogniserPlan("recogniser.pth", "arcface", (4, 4), seed=1, steps=1)
    with pytest.raises(InputError, match=r"\.onnx or \.safetensors"):
        train_recogniser(tmp_path, plan, people=2)


def test_the_tiny_models_recognisers_are_small_and_differ() -> None:
    assert [plan.dim for plan in TINY_RECOGNISERS] == [64, 64, 64]
    assert len({plan.seed for plan in TINY_RECOGNISERS}) == 3
    assert len({plan.channels for plan in TINY_RECOGNISERS}) == 3
    for plan in TINY_RECOGNISERS[:2]:
        network = ResNetRecogniser(plan.channels, plan.dim)
        assert sum(p.numel() for p in network.parameters()) < 500_000
