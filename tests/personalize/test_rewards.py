"""The two rewards on drawn faces: what they prefer, and that gradients lead there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from proteus_deploy.errors import CheckpointError, InputError
from proteus_deploy.evaluate.encoders import Encoders, load_encoders
from proteus_deploy.evaluate.face_similarity import face_embeddings, face_similarity, photo_embeddings
from proteus_deploy.personalize.face_reward import FaceReward
from proteus_deploy.personalize.frame_scores import FrameScores
from proteus_deploy.personalize.model import PersonalModel
from proteus_deploy.personalize.onnx_recogniser import OnnxRecogniser
from proteus_deploy.personalize.recognisers import face_reward
from proteus_deploy.personalize.settings import PersonalizeSettings
from proteus_deploy.tiny.trained import ENCODERS, MODEL
from proteus_deploy.training.avatars import make_clip, make_photo

GLINT = MODEL / "face_encoder/models/antelopev2/glintr_tiny.onnx"
PERSON, OTHER = 31, 34  # neither trained on nor held out


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    pytest.importorskip("cv2")
    pytest.importorskip("onnxruntime")
    return load_encoders(ENCODERS)


@pytest.fixture(scope="module")
def networks(encoders: Encoders) -> dict[str, nn.Module]:
    assert encoders.curricular is not None
    return {"glint": OnnxRecogniser(GLINT), "curricular": encoders.curricular}


@pytest.fixture(scope="module")
def reward(encoders: Encoders, networks: dict[str, nn.Module]) -> FaceReward:
    assert encoders.faces is not None
    return FaceReward(encoders.faces, networks, make_photo(PERSON, 0).image, faces=3, views=2)


def tensor_of(frames: object) -> Tensor:
    return torch.from_numpy(np.asarray(frames, dtype=np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def loss_of(reward: FaceReward, frames: Tensor, seed: int = 0) -> float:
    found = reward.loss(frames, Generator().manual_seed(seed))
    assert found is not None
    return float(found)


def test_the_person_is_preferred(reward: FaceReward) -> None:
    own, other = (tensor_of(make_clip(person, 0).frames[:6]) for person in (PERSON, OTHER))
    assert loss_of(reward, own) < 0.3 < loss_of(reward, other)
    assert loss_of(reward, own, 1) == loss_of(reward, own, 1) != loss_of(reward, own, 2)


def test_no_face_no_loss(reward: FaceReward) -> None:
    assert reward.loss(torch.full((2, 3, 96, 96), 0.5), Generator()) is None
    assert reward.similarity(np.full((2, 96, 96, 3), 127, np.uint8)) == 0


def test_hiding_the_face_gains_nothing(reward: FaceReward) -> None:
    clip = make_clip(PERSON, 0).frames[:1].repeat(16, axis=0)
    hidden = clip.copy()
    hidden[8:] = 127
    assert reward.similarity(hidden) == pytest.approx(reward.similarity(clip) / 2, abs=1e-6)


def test_gradients_make_a_face_more_like_the_photos(reward: FaceReward) -> None:
    frames = tensor_of(make_clip(OTHER, 0).frames[:3]).requires_grad_()
    before = reward.similarity(as_bytes(frames))
    for step in range(6):
        loss = reward.loss(frames, Generator().manual_seed(step))
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, frames)
        frames = (frames - 0.02 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    assert reward.similarity(as_bytes(frames)) > before + 0.1


def as_bytes(frames: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (frames.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_similarity_is_the_measure(encoders: Encoders, networks: dict[str, nn.Module]) -> None:
    clip, photo = make_clip(PERSON, 0).frames, make_photo(PERSON, 0).image
    assert encoders.faces is not None
    only = {"curricular": networks["curricular"]}
    own = photo_embeddings(photo, encoders.faces, encoders.curricular).cur
    found = face_embeddings(clip, encoders.faces, encoders.curricular).cur
    assert own is not None
    assert found is not None
    reward = FaceReward(encoders.faces, only, photo, faces=1, views=1)
    assert reward.similarity(clip) == pytest.approx(face_similarity(own, found, clipped=False), abs=1e-6)


def test_a_recogniser_in_onnx_is_the_runtimes() -> None:
    runtime = pytest.importorskip("onnxruntime")
    faces = 2 * torch.rand(3, 3, 112, 112) - 1
    (expected,) = runtime.InferenceSession(str(GLINT)).run(None, {"face": faces.numpy()})
    assert torch.allclose(OnnxRecogniser(GLINT)(faces), torch.from_numpy(expected), atol=1e-5)


def write_recogniser(file: Path, *, normalised: bool = False, **pool: Any) -> None:
    """The kinds of nodes that glintr100 and w600k_r50 are made of. pool: more attributes of its pooling."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)),
        "gain": rng.random(4) + 0.5,
        "shift": rng.normal(size=4),
        "mean": rng.normal(size=4),
        "var": rng.random(4) + 0.5,
        "slope": rng.random((4, 1, 1)),
        "matrix": rng.normal(size=(5, 4 * 14 * 14)) / 30,
        "bias": rng.normal(size=5),
        "level": np.array(127.5),
        "scale": np.array(1 / 127.5),
    }
    start: list[Any] = (
        [("Sub", ["x", "level"], "a", {}), ("Mul", ["a", "scale"], "b", {})] if normalised else []
    )
    nodes = [
        *start,
        ("Conv", ["b" if normalised else "x", "w"], "c", {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("BatchNormalization", ["c", "gain", "shift", "mean", "var"], "d", {"epsilon": 2e-5}),
        ("PRelu", ["d", "slope"], "e", {}),
        ("AveragePool", ["e"], "f", {"kernel_shape": [4, 4], "strides": [4, 4], **pool}),
        ("Flatten", ["f"], "g", {}),
        ("Dropout", ["g"], "h", {}),
        ("Gemm", ["h", "matrix", "bias"], "y", {"transB": 1}),
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [out], **more) for kind, inputs, out, more in nodes],
        "recogniser",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("pool", [{}, {"pads": [1, 1, 1, 1], "count_include_pad": 1}])
def test_nodes_of_the_published_recognisers(tmp_path: Path, normalised: bool, pool: dict[str, Any]) -> None:
    """With a normalisation of its own or without."""
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "recogniser.onnx"
    write_recogniser(file, normalised=normalised, **pool)
    faces = 2 * torch.rand(2, 3, 112, 112) - 1
    levels = faces.numpy() * 127.5 + 127.5 if normalised else faces.numpy()
    (expected,) = runtime.InferenceSession(str(file)).run(None, {"x": levels})
    assert torch.allclose(OnnxRecogniser(file)(faces), torch.from_numpy(expected), atol=1e-4)


def test_attributes_that_are_not_known(tmp_path: Path) -> None:
    """Padding that the mean of a window leaves out, on two sides only: it would change the vectors unseen."""
    write_recogniser(tmp_path / "recogniser.onnx", pads=[1, 1, 0, 0])
    with pytest.raises(CheckpointError, match=r"gives other vectors in PyTorch than on ONNX Runtime"):
        OnnxRecogniser(tmp_path / "recogniser.onnx")


def test_what_is_rewarded_never_measures(encoders: Encoders, tmp_path: Path) -> None:
    """A pack whose recogniser is the checkpoint's own, under whatever name."""
    shutil.copytree(ENCODERS / "models/buffalo_l", tmp_path / "models/buffalo_l")
    shutil.copy(GLINT, tmp_path / "models/buffalo_l/w600k_tiny.onnx")
    mixed = replace(encoders, faces=load_encoders(tmp_path).faces)
    photo, model = make_photo(PERSON, 0).image, PersonalModel.from_checkpoint(MODEL)
    with pytest.raises(InputError, match=r"are the same network, .* --recognisers curricular"):
        face_reward(model, mixed, photo, PersonalizeSettings())
    assert face_reward(model, mixed, photo, PersonalizeSettings(recognisers="curricular")).hash


def test_files_that_are_no_recogniser(tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="can't be read as ONNX"):
        OnnxRecogniser(tmp_path / "damaged.onnx")
    with pytest.raises(CheckpointError, match=r"has nodes of kind Reshape, Resize, .*gradients pass through"):
        OnnxRecogniser(GLINT.with_name("scrfd_tiny.onnx"))


def test_scores_are_clips(encoders: Encoders) -> None:
    """Through PyTorch's resizing what Pillow's gives, with gradients."""
    clip, scores = make_clip(PERSON, 0), FrameScores(encoders)
    frames = tensor_of(clip.frames[:4]).requires_grad_()
    found = scores(frames, scores.text(clip.prompt))
    assert encoders.clip is not None
    features = encoders.clip.image_features(clip.frames[:4])
    expected = 100 * features @ encoders.clip.text_features(clip.prompt)[0]
    assert torch.allclose(found.detach(), torch.from_numpy(expected), atol=0.05)
    found[0].backward()
    assert frames.grad is not None
    assert frames.grad[0].abs().max() > 0
    assert frames.grad[1:].abs().max() == 0


def test_what_is_missing_is_named(encoders: Encoders, tmp_path: Path) -> None:
    photo = make_photo(PERSON, 0).image
    model = PersonalModel.from_checkpoint(MODEL)
    settings = PersonalizeSettings()
    with pytest.raises(InputError, match=r"faces are looked for with a detector: X has no pack"):
        face_reward(model, Encoders(missing={"faces": "X has no pack"}), photo, settings)
    without = replace(
        encoders, curricular=None, missing={"curricular": "X has no curricularface.safetensors"}
    )
    with pytest.raises(InputError, match=r"recognisers is 'glint,curricular': X has no curricularface"):
        face_reward(model, without, photo, settings)
    assert face_reward(model, without, photo, replace(settings, recognisers="glint")).hash
    with pytest.raises(InputError, match=r"has no glintr\*\.onnx, .* --recognisers curricular"):
        face_reward(replace(model, face_encoder=tmp_path), encoders, photo, settings)
    with pytest.raises(InputError, match="needs a score of text and image: X has no clip"):
        FrameScores(Encoders(missing={"clip": "X has no clip"}))
