"""The shipped configurations, read by accelerate's own loader; FSDP and DeepSpeed themselves need GPUs."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest

from proteus_deploy.errors import BackendError
from proteus_deploy.training import processes
from proteus_deploy.training.network import TrainableTransformer
from proteus_deploy.training.settings import TrainSettings

pytest.importorskip("accelerate")


def read(name: str) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    with resources.as_file(
        resources.files("proteus_deploy.training") / "accelerate" / f"{name}.yaml"
    ) as file:
        return load_config_from_file(str(file))


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")]
)
def test_accelerate_reads_it(name: str, kind: str) -> None:
    config = read(name)
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16" == TrainSettings().mixed_precision
    assert not config.use_cpu
    assert TrainSettings().share(config.num_processes)


def test_fsdp_wraps_the_blocks(fake: Any) -> None:
    """The class that is named is the one that the network's blocks have; version 2, as the loop needs it."""
    options = read("fsdp").fsdp_config
    assert options["fsdp_version"] == 2
    network: TrainableTransformer = fake.small_network()
    kinds = {type(block).__name__ for block in network.denoiser.transformer_blocks}
    assert kinds == {options["fsdp_transformer_layer_cls_to_wrap"]}


def test_deepspeed_stage() -> None:
    assert read("deepspeed_zero2").deepspeed_config["zero_stage"] == 2


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        BackendError, match=r"needs the package accelerate; pip install 'proteus-deploy\[train\]'"
    ):
        processes.make_accelerator(TrainSettings())
