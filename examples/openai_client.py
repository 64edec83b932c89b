"""A video from a running server, with the `openai` package as it comes.

proteus-deploy serve demo/bundle
python examples/openai_client.py http://127.0.0.1:8000 demo/photo.png out.mp4
"""

import sys
from pathlib import Path

from openai import OpenAI

url, photo, output = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="none")
video = client.videos.create_and_poll(
    prompt="a person waves",
    input_reference=Path(photo),
    extra_body={"num_inference_steps": 25, "guidance_scale": 1.25, "seed": 42},
)
assert video.status == "completed", video.error
client.videos.download_content(video.id).write_to_file(output)
