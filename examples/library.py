"""A video from a photo and a prompt, in this process. Needs a bundle: `make demo` leaves one in demo/.

python examples/library.py demo/bundle demo/photo.png out.mp4
"""

import sys

from proteus_deploy import GenerateRequest, Pipeline

bundle, photo, output = sys.argv[1:]
with Pipeline.from_bundle(bundle, backend="onnxruntime") as pipeline:
    request = GenerateRequest(
        "a person waves", photo=photo, num_inference_steps=25, guidance_scale=1.25, seed=42
    )
    video = pipeline.generate(request, on_step=lambda step: print(f"step {step.index + 1} of {step.total}"))
video.save(output)
