"""Two servers behind one address, deployed from Python; `proteus-deploy serve --engine ray` does the same.

python examples/ray_servers.py demo/checkpoint postgresql://user:password@host/proteus file:///mnt/videos 8000
"""

import sys
from pathlib import Path

from ray import serve

from proteus_deploy.serving.messages import PipelineChoice
from proteus_deploy.serving.ray_engine import Scale, application
from proteus_deploy.serving.service import ServiceSettings

checkpoint, database, results, port = sys.argv[1:]
settings = ServiceSettings(
    PipelineChoice("checkpoint", str(Path(checkpoint).absolute())),
    data_dir=Path("proteus-data"),
    database_url=database,
    results_url=results,
)
serve.start(http_options={"port": int(port)})
serve.run(application(settings, Scale(replicas=2)), blocking=True)
