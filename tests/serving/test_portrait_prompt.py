"""Videos without a photo: what the API takes and shows, and what a worker makes of it."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from proteus_deploy.bundle import Bundle
from proteus_deploy.errors import BackendError, BundleError, Cancelled, CheckpointError, InputError
from proteus_deploy.pipeline import Pipeline
from proteus_deploy.portrait.plan import CacheSettings
from proteus_deploy.portrait.sampling import Sampling
from proteus_deploy.provenance import GENERATED
from proteus_deploy.serving.api_document import VideoObject
from proteus_deploy.serving.app import create_app
from proteus_deploy.serving.jobs import Claim, Job, JobResult, JobState
from proteus_deploy.serving.messages import Channel, PipelineChoice, WorkerSettings
from proteus_deploy.serving.pace import Pace
from proteus_deploy.serving.portraits import Portraits, portrait_model
from proteus_deploy.serving.progress import PortraitProgress
from proteus_deploy.serving.results import ResultFolder
from proteus_deploy.serving.service import Service, ServiceSettings
from proteus_deploy.serving.worker import Worker
from proteus_deploy.stage_cache import StageCache
from proteus_deploy.tiny.portrait_checkpoint import write_random_portrait
from proteus_deploy.tiny.trained import MODEL
from proteus_deploy.training.avatars import HELD_OUT_SEEDS, make_photo
from proteus_deploy.video import read_video

WHO = "a woman with red hair"
BODY = {"prompt": "a person waves", "num_inference_steps": 2, "seed": 5, "portrait_prompt": WHO}
TOKENS = 4


class Drawing:
    """A painter in whose pictures there is a face from seed `first` on. fault: raised instead."""

    sampling, cache = Sampling(), CacheSettings()

    def __init__(self, first: int = 0) -> None:
        self.first, self.seeds = first, list[int]()
        self.fault: Exception | None = None
        self.on_token: Callable[[int], object] = lambda _: None

    def draw(
        self, captions: Sequence[str], *, seeds: Sequence[int], report: Any, cancel: Any, **_: Any
    ) -> list[Any]:
        (_caption,), (seed,) = captions, seeds
        self.seeds.append(seed)
        if self.fault is not None:
            raise self.fault
        for done in range(1, TOKENS + 1):
            report("portrait", done, TOKENS)
            self.on_token(done)
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"the portrait was stopped at token {done} of {TOKENS}")
        meadow = Image.new("RGB", (256, 256), "green")
        return [_face(seed) if seed >= self.first else np.asarray(meadow)]


def _face(seed: int) -> Any:
    return make_photo(HELD_OUT_SEEDS[seed % 4], 0).image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_portrait(tmp_path_factory.mktemp("portrait") / "model")


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[Service]:
    """One with a portrait model, whose workers aren't started."""
    choice = PipelineChoice("checkpoint", str(MODEL), portrait=str(model))
    made = Service(ServiceSettings(choice, tmp_path / "data"))
    yield made
    made.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.from_checkpoint(MODEL) as opened:
        yield opened


class Working:
    """A worker in this process, on the jobs of a service."""

    def __init__(
        self, service: Service, pipeline: Pipeline, painter: Drawing | None, cache: StageCache | None = None
    ) -> None:
        self.store = service.store
        self.results: ResultFolder = service.results  # type: ignore[assignment]
        self.painter = painter
        ours, self.theirs = socket.socketpair()
        self.channel = Channel(ours)
        choice, folder = service.settings.pipeline, str(service.settings.data_dir)
        url = service.engine.url.render_as_string(hide_password=False)
        settings = WorkerSettings("w", choice, url, folder, lease_s=60, poll_s=0.02)
        portraits = None if painter is None else Portraits(choice, pipeline, cache)
        if painter is not None:
            painter.seeds.clear()  # of the trial at the start
        self.worker = Worker(settings, pipeline, self.channel, cache, portraits)
        self.told: list[dict[str, Any]] = []
        self.ear = threading.Thread(target=lambda: self.told.extend(Channel(self.theirs)), daemon=True)
        self.ear.start()

    def claim(self, limit: int = 1) -> list[Claim]:
        return self.store.claim_batch("w", lease_s=60, limit=limit)

    def do(self, claims: Sequence[Claim]) -> list[Job]:
        self.worker._do(claims)
        return [self.store.get(claim.job.id) for claim in claims]

    def news(self, job: str | None = None) -> list[dict[str, Any]]:
        """All that was told of progress, of one job where it is named; ends the worker."""
        self.worker._engine.dispose()
        self.channel.close()
        self.ear.join()
        self.theirs.close()
        told = [message for message in self.told if "progress" in message]
        return [message["progress"] for message in told if job in (None, message["job"])]


@pytest.fixture
def work(
    service: Service, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Working]]:
    """work(painter) -> a worker that draws with it."""
    made: list[Working] = []

    def start(painter: Drawing | None, cache: StageCache | None = None) -> Working:
        monkeypatch.setattr("proteus_deploy.portrait.opening.open_painter", lambda *_, **__: painter)
        made.append(Working(service, pipeline, painter, cache))
        return made[-1]

    yield start
    for one in made:
        one.news()


def _error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_asked_for_by_json_and_by_form(client: TestClient, service: Service) -> None:
    by_json = client.post("/v1/videos", json=BODY)
    by_form = client.post("/v1/videos", data={name: str(value) for name, value in BODY.items()})
    VideoObject.model_validate(by_json.json(), strict=True)
    assert by_json.json()["portrait_prompt"] == by_json.json()["identity_prompt"] == WHO
    first, second = (service.store.claim("w", lease_s=60) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.job.id, second.job.id) == (by_json.json()["id"], by_form.json()["id"])
    assert first.job.request == second.job.request
    assert first.job.request["portrait_prompt"] == WHO
    assert service.store.photo(first) is None
    own = client.post("/v1/videos", json=BODY | {"identity_prompt": "someone"}).json()
    assert (own["identity_prompt"], own["portrait_prompt"]) == ("someone", WHO)


def test_through_the_open_inference_protocol(client: TestClient, service: Service) -> None:
    values = {"prompt": "a person waves", "portrait_prompt": WHO}
    inputs = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]} for name, value in values.items()
    ]
    service.stopping.set()  # after the request was read and before it would be waited for
    answer = client.post("/v2/models/proteus-id/infer", json={"inputs": inputs})
    assert _error(answer, 503)["code"] == "stopping"
    names = [one["name"] for one in client.get("/v2/models/proteus-id").json()["inputs"]]
    assert "portrait_prompt" in names


def test_the_document_has_the_field(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for kind in document["paths"]["/v1/videos"]["post"]["requestBody"]["content"].values():
        assert "portrait" in kind["schema"]["properties"]["portrait_prompt"]["description"]
    answers = document["paths"]["/v1/videos/{video_id}/portrait"]["get"]["responses"]
    assert "image/png" in answers["200"]["content"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"character": "char_0"}, "portrait_prompt and character were both sent; a video has one person"),
        ({"portrait_prompt": ""}, "say who is to be drawn"),
        ({"portrait_prompt": "a\0b"}, "NUL"),
        ({"portrait_prompt": "a\ud800"}, "valid string"),
        ({"portrait_prompt": "x" * 2001}, "2000"),
        ({"portrait_prompt": 5}, "portrait_prompt"),
    ],
)
def test_refused(client: TestClient, service: Service, fields: dict[str, Any], said: str) -> None:
    content = json.dumps(BODY | fields)
    answer = client.post("/v1/videos", content=content, headers={"Content-Type": "application/json"})
    error = _error(answer, 400)
    assert error["param"] == "portrait_prompt"
    assert said in error["message"]
    assert service.store.counts()["queued"] == (0, 0.0)


def test_a_photo_and_a_portrait(client: TestClient, drawn_photo: bytes) -> None:
    files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
    answer = client.post("/v1/videos", data={"prompt": "x", "portrait_prompt": WHO}, files=files)
    assert "portrait_prompt and input_reference were both sent" in _error(answer, 400)["message"]
    neither = _error(client.post("/v1/videos", json={"prompt": "x"}), 400)
    assert neither["param"] == "input_reference"
    assert "or a portrait_prompt" in neither["message"]


def test_a_server_without_a_portrait_model(tmp_path: Path) -> None:
    made = Service(ServiceSettings(PipelineChoice("checkpoint", str(MODEL)), tmp_path / "data"))
    try:
        answer = TestClient(create_app(made)).post("/v1/videos", json=BODY)
        error = _error(answer, 400)
        assert (error["param"], error["code"]) == ("portrait_prompt", "no_portrait_model")
        assert "start it with --portrait DIR" in error["message"]
    finally:
        made.close()


def test_a_repeated_request(client: TestClient) -> None:
    key, body = {"Idempotency-Key": "one"}, {name: BODY[name] for name in ("prompt", "portrait_prompt")}
    first = client.post("/v1/videos", json=body, headers=key).json()
    assert client.post("/v1/videos", json=body, headers=key).json()["id"] == first["id"]
    other = client.post("/v1/videos", json=body | {"portrait_prompt": "a man"}, headers=key)
    assert _error(other, 409)["code"] == "idempotency_conflict"


def test_the_bundles_own_model(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[Path | None] = [None]
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: SimpleNamespace(portrait=own[0]))
    choice = PipelineChoice("bundle", str(tmp_path))
    assert portrait_model(choice) is None
    own[0] = tmp_path / "portrait"
    assert portrait_model(choice) == tmp_path / "portrait"
    assert portrait_model(replace(choice, portrait=str(model))) == model
    assert portrait_model(replace(choice, kind="checkpoint")) is None


def test_from_a_prompt_to_a_video_and_its_portrait(
    client: TestClient, service: Service, work: Callable[..., Working]
) -> None:
    made = client.post("/v1/videos", json=BODY).json()
    route = f"/v1/videos/{made['id']}"
    assert _error(client.get(f"{route}/portrait"), 409)["code"] == "video_not_ready"
    painter = Drawing(first=7)
    worker = work(painter)
    (job,) = worker.do(worker.claim())
    assert job.failure is None
    assert painter.seeds == [5, 6, 7]
    shown = client.get(route).json()
    VideoObject.model_validate(shown, strict=True)
    assert (shown["status"], shown["seed"], shown["portrait_seed"]) == ("completed", 5, 7)
    assert shown["stage_seconds"]["portrait"] > 0
    answer = client.get(f"{route}/portrait")
    assert (answer.headers["content-type"], answer.status_code) == ("image/png", 200)
    with Image.open(io.BytesIO(answer.content)) as image:
        texts = dict(image.text)  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(image), _face(7))
    assert json.loads(texts["Comment"]) == {"prompt": WHO, "seed": 7}
    assert GENERATED in texts["XML:com.adobe.xmp"]
    assert job.result is not None
    assert job.result.facts["portrait_bytes"] == len(answer.content)
    assert job.result.facts["seconds"] >= job.result.facts["stage_seconds"]["portrait"]
    video = read_video(worker.results.path(job.result.name))
    assert video.metadata["request"]["portrait"] == {"prompt": WHO, "seed": 7}
    # Another attempt at the same request gives the same bytes.
    again = client.post("/v1/videos", json=BODY).json()
    worker.do(worker.claim())
    assert client.get(f"/v1/videos/{again['id']}").json()["sha256"] == shown["sha256"]
    assert client.get(f"/v1/videos/{again['id']}/portrait").content == answer.content
    stages = [one["stage"] for one in worker.news()]
    assert stages[0] == "portrait"
    assert {"portrait", "identity", "denoise", "decode"} <= set(stages)
    for one in (made, again):
        assert client.delete(f"/v1/videos/{one['id']}").json()["deleted"]
    assert not any((service.settings.data_dir / "results").iterdir())


def test_a_video_of_a_photo_has_no_portrait(
    client: TestClient, drawn_photo: bytes, work: Callable[..., Working]
) -> None:
    files = {"input_reference": ("photo.png", drawn_photo, "image/png")}
    fields = {"prompt": "a person waves", "num_inference_steps": "2"}
    made = client.post("/v1/videos", data=fields, files=files).json()
    assert made["portrait_prompt"] is None
    painter = Drawing()
    worker = work(painter)
    (job,) = worker.do(worker.claim())
    assert job.state is JobState.COMPLETED
    assert painter.seeds == []
    assert "portrait_seed" not in client.get(f"/v1/videos/{made['id']}").json()
    assert _error(client.get(f"/v1/videos/{made['id']}/portrait"), 404)["code"] == "no_portrait"


def test_no_face(client: TestClient, work: Callable[..., Working]) -> None:
    made = client.post("/v1/videos", json=BODY).json()
    worker = work(Drawing(first=100))
    worker.do(worker.claim())
    shown = client.get(f"/v1/videos/{made['id']}").json()
    assert (shown["status"], shown["error"]["code"]) == ("failed", "invalid_request")
    assert "seeds 5 to 8 were tried" in shown["error"]["message"]
    assert _error(client.get(f"/v1/videos/{made['id']}/portrait"), 400)["code"] == "invalid_request"


def test_a_batch_and_the_one_without_a_face(client: TestClient, work: Callable[..., Working]) -> None:
    ids = [client.post("/v1/videos", json=BODY | {"seed": seed}).json()["id"] for seed in (50, 5, 51)]
    painter = Drawing(first=50)
    worker = work(painter)
    claims = worker.claim(limit=3)
    assert [claim.job.id for claim in claims] == ids, "they can share a batch"
    first, faceless, second = worker.do(claims)
    assert faceless.failure is not None
    assert (faceless.failure.code, faceless.attempt) == ("invalid_request", 1)
    assert "seeds 5 to 8 were tried" in faceless.failure.message
    assert [job.result is not None and job.result.facts["batch"] for job in (first, second)] == [2, 2]
    assert painter.seeds == [50, 5, 6, 7, 8, 51], "no portrait is drawn again"
    seeds = [client.get(f"/v1/videos/{one}").json().get("portrait_seed") for one in ids]
    assert seeds == [50, None, 51]
    alone = client.post("/v1/videos", json=BODY | {"seed": 50}).json()["id"]
    worker.do(worker.claim())
    portraits = [client.get(f"/v1/videos/{one}/portrait").content for one in (alone, ids[0], ids[2])]
    assert portraits[0] == portraits[1], "whatever it is made beside"
    assert portraits[1] != portraits[2]


def test_a_batch_none_of_which_has_a_face(client: TestClient, work: Callable[..., Working]) -> None:
    for seed in (5, 6):
        client.post("/v1/videos", json=BODY | {"seed": seed})
    worker = work(Drawing(first=100))
    jobs = worker.do(worker.claim(limit=2))
    assert [job.state for job in jobs] == [JobState.FAILED] * 2


def test_a_batch_of_a_photo_and_a_portrait(
    client: TestClient, drawn_photo: bytes, work: Callable[..., Working]
) -> None:
    """What is told of the portrait is told of its own job only, to clients and to the database."""
    photo = base64.b64encode(drawn_photo).decode()
    bodies = (BODY | {"portrait_prompt": None, "input_reference": f"data:image/png;base64,{photo}"}, BODY)
    ids = [client.post("/v1/videos", json=body).json()["id"] for body in bodies]
    painter = Drawing()
    worker = work(painter)
    claims = worker.claim(limit=2)
    assert [claim.job.id for claim in claims] == ids
    stored: list[Any] = []

    def renew(done: int) -> None:
        current = worker.worker._current
        assert current is not None
        for claim in claims if done == 1 else ():
            worker.worker._renew(current, claim)
            stored.append(worker.store.get(claim.job.id).progress)

    painter.on_token = renew
    jobs = worker.do(claims)
    assert stored == [None, {"stage": "portrait", "done": 1, "total": TOKENS, "percent": 0, "eta_s": None}]
    stages = [job.result.facts["stage_seconds"] for job in jobs if job.result is not None]
    assert ["portrait" in one for one in stages] == [False, True]
    assert stages[0]["denoise"] == stages[1]["denoise"], "made together"
    worker.news()
    told = [{one["stage"] for one in worker.news(name)} for name in ids]
    assert told[1] - told[0] == {"portrait"}


def test_cancelled_between_tokens(client: TestClient, service: Service, work: Callable[..., Working]) -> None:
    made = client.post("/v1/videos", json=BODY).json()
    painter = Drawing()
    worker = work(painter)
    seen: list[int] = []

    def cancel(done: int) -> None:
        seen.append(done)
        if done == 2:
            service.store.cancel(made["id"])
            worker.worker._current.drop(claims[0], "cancelled")  # type: ignore[union-attr]

    painter.on_token = cancel
    claims = worker.claim()
    (job,) = worker.do(claims)
    assert job.state is JobState.CANCELLED
    assert seen == [1, 2]


def test_one_of_a_batch_is_cancelled_between_tokens(
    client: TestClient, service: Service, work: Callable[..., Working]
) -> None:
    ids = [client.post("/v1/videos", json=BODY | {"seed": seed}).json()["id"] for seed in (5, 6)]
    painter = Drawing()
    worker = work(painter)
    seen: list[int] = []
    rows: set[tuple[int, ...]] = set()

    def cancel(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            current: Any = worker.worker._current
            service.store.cancel(ids[0])
            current.drop(claims[0], "cancelled")
            current.previews.on_step = lambda _, batch: rows.add(tuple(batch))

    painter.on_token = cancel
    claims = worker.claim(limit=2)
    cancelled, made = worker.do(claims)
    assert cancelled.state is JobState.CANCELLED
    assert seen == [1, 2, *range(1, TOKENS + 1)]
    assert made.result is not None
    assert (made.result.facts["batch"], made.result.facts["portrait_seed"]) == (1, 6)
    assert rows == {(1,)}, "pictures of the batch are the second job's"


def test_portraits_that_come_again_are_remembered(client: TestClient, work: Callable[..., Working]) -> None:
    painter = Drawing(first=6)
    worker = work(painter, StageCache(64 << 20))
    for _ in range(2):
        client.post("/v1/videos", json=BODY)
        worker.do(worker.claim())
    assert painter.seeds == [5, 6]
    client.post("/v1/videos", json=BODY | {"portrait_prompt": "a man"})
    worker.do(worker.claim())
    assert painter.seeds == [5, 6, 5, 6]


def test_a_worker_without_a_model(client: TestClient, work: Callable[..., Working]) -> None:
    """Of another server on the same database."""
    made = client.post("/v1/videos", json=BODY).json()
    worker = work(None)
    worker.do(worker.claim())
    error = _error(client.get(f"/v1/videos/{made['id']}/portrait"), 500)
    assert error["code"] == "portrait_unavailable"
    assert "this server has no portrait model; start each of them with --portrait" in error["message"]


@pytest.mark.parametrize("kind", [CheckpointError, BundleError, BackendError])
def test_a_model_that_fails_is_not_the_callers_fault(
    client: TestClient, work: Callable[..., Working], kind: type[InputError]
) -> None:
    made = client.post("/v1/videos", json=BODY).json()
    painter = Drawing()
    worker = work(painter)
    painter.fault = kind("vq_decoder.onnx is gone")
    worker.do(worker.claim())
    error = _error(client.get(f"/v1/videos/{made['id']}/portrait"), 500)
    assert (error["code"], error["message"]) == (
        "portrait_unavailable",
        "the portrait can't be drawn: vq_decoder.onnx is gone",
    )


def test_a_video_that_cannot_be_written_leaves_no_portrait(
    client: TestClient, work: Callable[..., Working], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/v1/videos", json=BODY)
    worker = work(Drawing())
    written: list[str] = []
    write_portrait = worker.worker._results.write_portrait

    def write(claim: Claim, png: bytes) -> None:
        write_portrait(claim, png)
        written.append(claim.job.id)

    def save(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(worker.worker._results, "write_portrait", write)
    monkeypatch.setattr(worker.worker, "_save", save)
    claims = worker.claim()
    with pytest.raises(OSError, match="disk full"):
        worker.do(claims)
    assert written == [claims[0].job.id]
    assert not any(worker.results._folder.iterdir())


def test_progress_of_a_portrait_is_told_now_and_then() -> None:
    now, told = [0.0], list[dict[str, Any]]()
    progress = PortraitProgress(told.append, clock=lambda: now[0])
    for done in range(1, 101):
        now[0] += 0.05
        progress("portrait", done, 100)
    assert 20 <= len(told) <= 30
    assert told[0]["done"] == 1
    assert told[-1] == {"stage": "portrait", "done": 100, "total": 100, "percent": 0, "eta_s": None}


def test_what_portraits_take_is_waited_for(client: TestClient, service: Service) -> None:
    service.settings = replace(service.settings, max_wait_s=7.0)
    cost = 0.0
    for seconds in (2.0, 4.0, 60.0):
        job = client.post("/v1/videos", json=BODY).json()["id"]
        claim = service.store.claim("w", lease_s=60)
        assert claim is not None
        cost = claim.job.cost
        facts = {"seconds": 3.0 + seconds, "stage_seconds": {"portrait": seconds, "denoise": 2.0}}
        service.store.complete(claim, JobResult(f"{job}-1.mp4", 1, "0", facts))
    pace = service.store.pace()
    assert pace == Pace(job_s=1.0, cost_s=2.0 / cost, portrait_s=4.0)
    assert client.post("/v1/videos", json=BODY).status_code == 200
    assert service.wait_s() == pytest.approx(3 + 4)
    assert client.post("/v1/videos", json=BODY).status_code == 200, "7 s of work are there, as may be"
    assert service.wait_s() == pytest.approx(2 * (3 + 4))
    full = client.post("/v1/videos", json=BODY)
    assert _error(full, 429)["code"] == "queue_full"
    assert full.headers["retry-after"] == "7"
    assert service.store.claim("w", lease_s=60) is not None
    assert service.wait_s() == pytest.approx(2 * (3 + 4)), "running ones, too"


def test_portraits_share_the_fate_of_their_videos(
    tmp_path: Path, new_claim: Callable[..., Claim], saving: Callable[[bytes], Callable[[Path], None]]
) -> None:
    results = ResultFolder(tmp_path)
    kept, orphan, early = (new_claim(number) for number in (1, 2, 3))
    for claim in (kept, orphan, early):
        results.write_portrait(claim, b"png")
    names = [results.write(claim, saving(b"mp4")).name for claim in (kept, orphan)]
    assert results.sweep(lambda: {names[0]}) == sorted(
        [names[1], names[1].replace("mp4", "png"), f"{early.job.id}-3.png"]
    )
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".mp4", ".png"]
    results.remove(names)
    assert list(tmp_path.iterdir()) == []
