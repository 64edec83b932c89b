"""Does a checkpoint of real size export on a machine with 24 GB, and what does it cost?

Writes a folder with the published configuration (no weights), exports it with made-up weights in a
process of its own, and records wall time, peak memory and file sizes.

    python -m proteus_deploy.benchmarks.real_size_export --work-dir /tmp/real --output results.json
    python -m proteus_deploy.benchmarks.real_size_export --work-dir /tmp/real --output results.json \
        --quantize int8 --quantize fp8

The bundle is about 28 GiB in bf16; it is removed afterwards unless --keep is given. With --quantize, the
denoiser alone is written, once for each recipe; statistics are made up like the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proteus_deploy._files import write_json
from proteus_deploy.benchmarks.limited_process import Limits, run_limited
from proteus_deploy.benchmarks.machine import describe_commit, describe_machine, describe_versions
from proteus_deploy.benchmarks.real_size_denoiser import export_command
from proteus_deploy.errors import InputError

_MOST_MEMORY_BYTES = 18 << 30  # of a child: the 24 GB of the machine less what others need

# CogVideoX-5B-I2V with the identity modules of the published Proteus-ID code.
TRANSFORMER: dict[str, Any] = {
    "_class_name": "ProteusIDTransformer3DModel",
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 16,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embed_dim": 512,
    "ofs_embed_dim": None,
    "text_embed_dim": 4096,
    "num_layers": 42,
    "attention_bias": True,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_kps": False,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 128,
    "cross_attn_num_heads": 16,
    "local_face_scale": 1.0,
    "FT_output_dim": 4096,
    "FT_txt_dim": 4096,
    "FT_num_querie": 32,
    "FT_depth": 10,
    "FT_num_scale": 5,
    "FT_num_heads": 64,
    "FT_dim_head": 64,
    "FT_clip_dim": 1280,
    "FT_vit_dim": 1024,
    "FFE_query_dim": 2048,
    "FFE_output_dim": 2048,
    "FFE_num_queries": 32,
    "FFE_layers": 10,
    "FFE_heads": 32,
    "FFE_clip_dim": 1280,
    "FFE_vit_dim": 1024,
    "FFE_input_img_dim": 2048,
    "FFE_input_fuse_dim": 4096,
    "FFE_time_channel": 3072,
    "FFE_time_embed_dim": 2048,
    "FFE_timestep_activation_fn": "silu",
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 3,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 0.7,
    "temporal_compression_ratio": 4,
    "invert_scale_latents": False,
}
TEXT_ENCODER: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "CogVideoXDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def write_configs(folder: Path, layers: int = TRANSFORMER["num_layers"]) -> Path:
    """A checkpoint folder of real size without its weights. layers: fewer for a slice of the transformer."""
    documents = {
        "model_index.json": {"_class_name": "ProteusIDPipeline"},
        "transformer/config.json": {**TRANSFORMER, "num_layers": layers},
        "vae/config.json": VAE,
        "text_encoder/config.json": TEXT_ENCODER,
        "scheduler/scheduler_config.json": SCHEDULER,
    }
    for name, document in documents.items():
        write_json(folder / name, document)
    (folder / "tokenizer").mkdir(exist_ok=True)
    return folder


def measure(work: Path, dtype: str) -> dict[str, Any]:
    """Export in a child process; returns the row of the result file."""
    bundle = work / "bundle"
    command = [
        sys.executable,
        "-m",
        "proteus_deploy.cli.main",
        "export",
        str(write_configs(work / "configs")),
    ]
    command += ["--output-dir", str(bundle), "--dtype", dtype, "--random-weights", "0", "--overwrite"]
    started = time.perf_counter()
    child = subprocess.run(command, check=False)  # noqa: S603 - our own module
    seconds = time.perf_counter() - started
    # ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    row: dict[str, Any] = {
        "case": "export",
        "dtype": dtype,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }
    if child.returncode != 0:
        return {**row, "status": "failed", "reason": f"exit code {child.returncode}"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    sizes = {
        name: sum(manifest["files"][file]["bytes"] for file in record["files"])
        for name, record in manifest["graphs"].items()
    }
    return {**row, "status": "ok", "graph_bytes": sizes, "bundle_bytes": sum(sizes.values())}


def measure_quantised(work: Path, dtype: str, recipe: str, layers: int, *, keep: bool) -> dict[str, Any]:
    """Export the denoiser with a recipe in a child process; returns the row of the result file."""
    configs = write_configs(work / f"configs-{layers}", layers)
    folder = work / f"denoiser-{Path(recipe).stem}-{layers}"
    limits = Limits(anonymous_bytes=_MOST_MEMORY_BYTES)
    outcome = run_limited(export_command(configs, folder / "denoiser.onnx", recipe, dtype), limits)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    row: dict[str, Any] = {"case": "export", "recipe": recipe, "dtype": dtype, "layers": layers}
    if outcome.result is None:
        return {**row, "status": "failed", "reason": outcome.reason, "seconds": outcome.seconds}
    return {**row, "status": "ok", **outcome.result}


def earlier_rows(file: Path, commit: str) -> list[dict[str, Any]]:
    """Rows of a file that goes on; none where there is no file. Raises InputError for another commit."""
    if not file.is_file():
        return []
    document = json.loads(file.read_text(encoding="utf-8"))
    if document["commit"] != commit:
        raise InputError(
            f"{file} holds results of commit {document['commit']}, and this is {commit}; name another file, "
            "since one file can't hold both"
        )
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def put_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Append a row, or put it in the place of the one of the same case."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(one.get(field) for field in ("case", "recipe", "dtype", "layers", "target"))

    places = [index for index, one in enumerate(rows) if key(one) == key(row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="needs 30 GiB free")
    parser.add_argument("--output", type=Path, required=True, help="result file, JSON")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="bf16")
    parser.add_argument(
        "--quantize", action="append", metavar="RECIPE", help="the denoiser alone, quantised; repeatable"
    )
    parser.add_argument(
        "--layers", type=int, default=TRANSFORMER["num_layers"], help="of the denoiser, with --quantize"
    )
    parser.add_argument("--keep", action="store_true", help="keep what was exported")
    arguments = parser.parse_args(argv)
    work, dtype, recipes, layers = arguments.work_dir, arguments.dtype, arguments.quantize, arguments.layers
    if recipes is None and layers != TRANSFORMER["num_layers"]:
        parser.error("--layers is for --quantize: a bundle is of the whole size")
    commit = describe_commit(Path(__file__).resolve().parent.parent)
    rows = earlier_rows(arguments.output, commit)
    settings: dict[str, Any] = {
        "weights": "random, made while read",
        "layers": layers,
        "width": TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"],
        "face_encoder": "absent",
    }
    if recipes is not None:
        settings["graphs"] = ["denoiser"]
    result = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": commit,
        "settings": settings,
        "rows": rows,
    }
    for recipe in recipes or (None,):
        if recipe is None:
            row = measure(work, dtype)
        else:
            row = measure_quantised(work, dtype, recipe, layers, keep=arguments.keep)
        rows[:] = earlier_rows(arguments.output, commit)  # another process may have added some meanwhile
        put_row(rows, row)
        write_json(arguments.output, result)  # after each: a row takes minutes
        print(json.dumps(row), flush=True)
    if not arguments.keep:
        shutil.rmtree(work / "bundle", ignore_errors=True)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
