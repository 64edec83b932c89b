"""A video from Triton Inference Server, by its own client; progress arrives while it is made.

proteus-deploy export demo/bundle --triton models
tritonserver --model-repository models --disable-auto-complete-config
python examples/triton_client.py 127.0.0.1:8001 demo/photo.png out.mp4
"""

import sys
from pathlib import Path
from queue import Queue

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

url, photo, output = sys.argv[1:]
values = {
    "prompt": ("BYTES", b"a person waves", np.object_),
    "photo": ("BYTES", Path(photo).read_bytes(), np.object_),
    "num_inference_steps": ("INT64", 25, np.int64),
    "guidance_scale": ("FP64", 1.25, np.float64),
    "seed": ("INT64", 42, np.int64),
}
inputs = [
    InferInput(name, [1], kind).set_data_from_numpy(np.array([value], dtype))
    for name, (kind, value, dtype) in values.items()
]
answers: Queue = Queue()
client = InferenceServerClient(url)
client.start_stream(lambda result, error: answers.put((result, error)))
client.async_stream_infer("proteus", inputs)
while True:
    result, error = answers.get()
    assert error is None, error
    if (video := result.as_numpy("video")) is not None:
        break
    phase, done, total = (result.as_numpy(name)[0] for name in ("phase", "done", "total"))
    print(f"{phase.decode()}: {done} of {total}")
client.stop_stream()
Path(output).write_bytes(video[0])
