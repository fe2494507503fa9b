"""The fixed list of `scripts/same_results.py`, and how one checkout runs it.

    python same_results_list.py SHARED                   make what both checkouts use, in a folder
    python same_results_list.py CHECKOUT OUT NAME ...    run these by the package of one checkout, the first on the path

Imports nothing of ours at the top: the reference runs this very file with its own package. To cover something new, add
a line here.
"""

import importlib
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Content = dict[str, Any]  # what is compared, by name: arrays, and plain values of JSON

# What every training here says, and what each says beside that. Paths are below the folder of its checkout's results,
# which is the working directory; `shared` there leads to what both use.
TINY = """--model.base shared/base --data.folder shared/small --data.held_out_fraction 0.3 --data.resolution 64
    --data.cache cache --adapter.rank 4 --adapter.alpha 8 --optim.learning_rate 1e-2 --optim.warmup_steps 2
    --train.mixed_precision no --train.ema_decay 0.9 --logging.every 1
    --validation.timesteps 2 --validation.steps 2"""
TRAIN = {
    "hybrid": f"""{TINY} --diffusion.timestep_law importance --adapter.dropout 0.1 --optim.decay cosine --train.steps 60
        --train.batch_size 4 --train.checkpoint_every 20 --validation.every 10 --validation.samples_every 20
        --prompt Circle --prompt square""",
    "weighted": f"""{TINY} --diffusion.schedule cosine --diffusion.time_conditioning snr_matched
        --diffusion.loss_space v_prediction --diffusion.error huber --diffusion.weighting min_snr
        --diffusion.timestep_law logit_normal --train.accumulation 2 --train.batch_size 2 --train.steps 10""",
    "vlb": f"{TINY} --diffusion.objective vlb --diffusion.timestep_law stratified --train.steps 10",
    "v": f"""{TINY.replace("shared/base", "shared/v")} --diffusion.objective vlb --diffusion.timestep_range [200,700]
        --train.steps 10""",
    "su": f"{TINY} --diffusion.objective su_reduced --train.steps 10 --optim.decay linear",
    "quickstart": """--config quickstart --data.folder shared/large --data.held_out null --data.held_out_fraction 0.25
        --data.cache cache --train.steps 3 --train.batch_size 2 --optim.warmup_steps 0 --validation.timesteps 2
        --validation.prompts [] --train.mixed_precision no""",
}
DRAW = {"--model": "demo", "--prompt": '"red apple"', "--steps": "3"}  # where a line says nothing else
START = "--image shared/large/001.png"
GENERATE = {
    "ddpm": "--sampler ddpm --variance beta",
    "ddpm_greedy": "--sampler ddpm_greedy",
    "iddpm": "--sampler iddpm --spacing trailing",
    "ddim": "",
    "ddim_eta": "--sampler ddim --eta 0.5 --spacing leading",
    "euler": "--sampler euler --spacing exponential",
    "euler_ancestral": "--sampler euler_ancestral --spacing linspace",
    "edm": "--sampler edm --rho 5 --sigma-max 40",
    "edm_churn": "--sampler edm --s-churn 2 --s-min 0.1 --s-noise 1.003",
    "score_sde": "--sampler score_sde --predictor ancestral",
    "annealed_langevin": "--sampler annealed_langevin --langevin-steps 2",
    "pf_ode": "--sampler pf_ode",
    "pf_ode_adaptive": "--sampler pf_ode --tolerance 0.1 --steps 30",
    **{name: f"--sampler {name}" for name in ("dpm++", "dpm++_sde", "unipc", "deis", "heun", "dpm2", "dpm2_ancestral")},
    **{name: f"--sampler {name} --steps 5" for name in ("lms", "pndm")},
    "start": f"{START} --strength 0.5",
    "start_sigma": f"{START} --strength 0.7 --sampler edm",
    "inversion": f"{START} --inversion --guidance 1 --strength 1",
    "schedule": "--schedule cosine",
    "schedule_index": "--schedule linear --time-conditioning index --sampler iddpm",
    "negative": "--negative-prompt blue --guidance 7 --guidance-interval [200,800]",
    "several": '--prompt "red apple" --prompt "cat face" --images-per-prompt 2 --seed 5 --batch-size 3 --width 192',
    "bfloat16": "--model shared/base --dtype bfloat16",  # the tiny one: the demo takes minutes
    "adapter": "--lora runs/quickstart --lora-scale 0.7",
    "raw": "--lora runs/quickstart --weights raw --sampler iddpm",
    "interval": "--lora runs/quickstart --lora-interval 300 800",
    "interval_trained": "--lora runs/v --model shared/v --sampler euler --steps 6",
    **{
        f"v_{name}": f"--model shared/v --sampler {name} --guidance 3" for name in ("ddim", "edm", "score_sde", "dpm++")
    },
    "v_adaptive": "--model shared/v --sampler pf_ode --tolerance 0.1 --steps 30",
}
PYTHON = ("TextToImage", "PixArtPipeline", "PixArtPipeline_start", "PixArtPipeline_v")
GOLDEN = ("schedule", "pointwise", "hybrid", "vlb", "lookup", "gmm", "traj", "sigma", "sde")


def make_shared(folder: Path) -> None:
    """What both checkouts use: two tiny bases with random weights (eps and v), small pictures and large ones."""
    from tests.helpers.tiny import build_picture_folder, build_tiny_pipeline, edit

    build_tiny_pipeline(folder / "base")
    edit(build_tiny_pipeline(folder / "v") / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    build_picture_folder(folder / "small", 12)
    build_picture_folder(folder / "large", 4, size=256)


def names() -> list[str]:
    """What there is to run, in order."""
    every = {"train": TRAIN, "generate": GENERATE, "python": PYTHON, "golden": GOLDEN}
    return [f"{kind}/{name}" for kind, of in every.items() for name in of]


def run_all(checkout: Path, out: Path, chosen: list[str]) -> None:
    """Run what is chosen by the package of one checkout, into `out`; each in a process forked from this one."""
    import pixart_ft

    place = Path(str(pixart_ft.__file__)).resolve()
    assert place.is_relative_to(checkout), f"{place} is not the package of {checkout}"
    print(f"{checkout.name}: {place}", flush=True)
    for name in pixart_ft.__all__:  # imports what the commands will, once
        getattr(pixart_ft, name)
    golden = golden_names(checkout)
    for each in chosen:
        kind, _, name = each.partition("/")
        if kind == "train":
            _apart(out, each, _command, f"train {TRAIN[name]} --run.folder runs/{name}")
        elif kind == "generate":
            options = DRAW | {"--out": each}
            missing = "".join(f" {key} {value}" for key, value in options.items() if key not in GENERATE[name])
            _apart(out, each, _command, f"generate {GENERATE[name]}{missing}")
        elif kind == "python":
            _apart(out, each, _python, name)
        else:
            _apart(out, each, _golden, golden, name)


def _apart(out: Path, name: str, work: Callable[..., Content | None], *arguments: object) -> None:
    """Run `work` in a process of its own, whose arrays are saved and whose output is kept; a failure is told of."""
    printed, begun = out / "printed" / f"{name}.txt", time.perf_counter()
    printed.parent.mkdir(parents=True, exist_ok=True)

    def body() -> None:
        with printed.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(out)
        if (arrays := work(*arguments)) is not None:
            (out / name).parent.mkdir(exist_ok=True)
            np.savez(out / f"{name}.npz", **arrays)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    seconds = f"{name} ({time.perf_counter() - begun:.1f} s)"
    if process.exitcode:
        lines = [line for line in printed.read_text().splitlines() if line.strip()]
        seconds += f": FAILED, {lines[-1] if lines else 'without a word'}"
    print(f"    {seconds}", flush=True)


def _command(line: str) -> None:
    """A command as on the command line."""
    from pixart_ft.cli import main
    from pixart_ft.config.train import TrainConfig

    if "adapter" not in TrainConfig.model_fields:  # of a reference from before the section had this name
        line = line.replace("--adapter.", "--lora.")
    sys.exit(main(shlex.split(line)))


def _python(name: str) -> Content:
    """Pictures from Python."""
    import torch
    from PIL import Image

    import pixart_ft
    from pixart_ft.schedulers import SCHEDULERS

    if name == "TextToImage":
        model = pixart_ft.TextToImage.load("demo", lora="runs/quickstart", lora_scale=1.0)
        pictures = model.generate(["red apple", "cat"], sampler="ddim", steps=2, guidance=4.5, seeds=[0, 1])
        return {str(number): np.asarray(picture) for number, picture in enumerate(pictures)}
    pipeline: Any = pixart_ft.PixArtPipeline.from_pretrained("shared/v" if name.endswith("v") else "shared/base")
    start = {"image": Image.open("shared/large/001.png"), "strength": 0.6} if name.endswith("start") else {}
    found = {}
    for sampler, scheduler in SCHEDULERS.items():
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("a red circle", num_inference_steps=6, generator=generator, output_type="latent", **start)
        found[sampler] = drawn.images.numpy()
    return found


def golden_names(checkout: Path) -> dict[str, Any]:
    """Everything that the modules about golden files in the tests define."""
    import tests

    assert Path(str(tests.__file__)).resolve().is_relative_to(checkout), f"{tests.__file__} is not of {checkout}"
    found: dict[str, Any] = {}
    for path in sorted((checkout / "tests").rglob("*golden*.py")):
        module = importlib.import_module(".".join(path.relative_to(checkout).with_suffix("").parts))
        found |= vars(module)
    return found


def _golden(names: dict[str, Any], group: str) -> Content:
    """The counterparts of the expected arrays of a group, by functions and scheduler classes, in both precisions."""
    golden, found = names["load_golden"](), {}
    for inputs, precision in ((golden, "float64"), (names["in_float32"](golden), "float32")):
        for array in golden.expected(group):
            found[f"{array} {precision}"] = names["VALUES"][group](inputs, array)
            if group in names["SCHEDULED"] and names["scheduled"](array):
                found[f"{array} {precision} by schedulers"] = names["SCHEDULED"][group](inputs, array)
    return {name: value.numpy() for name, value in found.items()}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make_shared(Path(sys.argv[1]))
    else:
        run_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
