"""The same by the Open Inference Protocol (KServe v2), with nothing but Python.

proteus-deploy serve demo/bundle
python examples/open_inference.py http://127.0.0.1:8000 demo/photo.png out.mp4
"""

import base64
import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

url, photo, output = sys.argv[1:]
values = {
    "prompt": ("BYTES", "a person waves"),
    "photo": ("BYTES", base64.b64encode(Path(photo).read_bytes()).decode()),
    "num_inference_steps": ("INT64", 25),
    "guidance_scale": ("FP64", 1.25),
    "seed": ("INT64", 42),
}
inputs = [
    {"name": name, "shape": [1], "datatype": kind, "data": [value]} for name, (kind, value) in values.items()
]
body = json.dumps({"inputs": inputs}).encode()
request = Request(f"{url}/v2/models/proteus-id/infer", body, {"Content-Type": "application/json"})  # noqa: S310
outputs = {one["name"]: one["data"][0] for one in json.load(urlopen(request))["outputs"]}  # noqa: S310
Path(output).write_bytes(base64.b64decode(outputs["video"]))
