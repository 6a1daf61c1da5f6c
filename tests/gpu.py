"""Does all of it work on a GPU, as it does on a CPU, and how fast?

    python -m tests.gpu --output data/results/gpu                # all parts, on one H100 or H200 within 9 minutes
    python -m tests.gpu --parts waits port                       # some
    python -m tests.gpu --small --device cpu --repeats 1         # a rehearsal without a GPU, in tiny sizes: no result

Nothing is downloaded: the models are the embedded one, and random weights of real shapes. Each part prints its table
and one line: what was found, and what was hoped for. One that fails does not stop the others; the exit code is then 1.
It is 2, with one line, where there is no CUDA. Writes benchmark.json and .md after each part; a rehearsal writes
rehearsal.json and .md. tests/test_gpu.py rehearses every part, so that none is first run on somebody's GPU.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from mlc_min import loop, train
from mlc_min.examples import Example, encode_rows
from mlc_min.lab.experiment import MAIN, MLC, World, run
from mlc_min.lab.sentences import ALIGNED, EMBEDDED
from mlc_min.machinery.checkpoint import last_good
from mlc_min.machinery.errors import InputError, first_line, run_command
from mlc_min.machinery.models import add_adapters, load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.machinery.settings import TrainConfig
from mlc_min.ports.trl import NAMES
from tests.benchmark import parts
from tests.benchmark.__main__ import run_parts
from tests.benchmark.measure import alternate, fresh, utilisation
from tests.benchmark.workloads import Workload, dpo_operations, mlc_operations

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = f"{Path(train.__file__).parent}{os.sep}"
RECIPE = TrainConfig(freeze="", steps=4, batch_size=4, **MLC)
ALLOWED = {"float32": 1e-4, "bfloat16": 0.05}  # relative errors, by the arithmetic; a CPU has 1e-6 and 6e-3


def embedded() -> tuple[torch.nn.Module, list[Example]]:
    """The embedded model, on the CPU, and its first 16 training rows."""
    model, tokenizer = load_model(EMBEDDED / "model")
    rows = read_rows(EMBEDDED / "train.jsonl", ALIGNED, ("chosen", "rejected"))[:16]
    return model, encode_rows(rows, tokenizer, ALIGNED, RECIPE.max_length)[0]


def trained(model, examples: list[Example], recipe: TrainConfig) -> tuple[list[float], torch.Tensor]:
    """Train by `train.fit`: the losses of the logged steps, which are the first and the last, and the gradient of the
    first, before it is clipped, all parameters in one row, float64 on the CPU."""
    gradients, clip = [], torch.nn.utils.clip_grad_norm_

    def keep(parameters, limit):
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in parameters]))
        return clip(parameters, limit)

    with patch.object(torch.nn.utils, "clip_grad_norm_", keep):
        _, history = train.fit(recipe, model, examples, quiet=True)
    return [line["loss"] for line in history], gradients[0]


def agreement(at) -> dict:
    """Losses and gradients against float64 on a CPU, with each method and each way to save memory"""
    # Without an extractor, whose start would be drawn in float32. What transformers and our log-softmax put to float32,
    # such as norms, is float32 in the exact ones too. On CUDA the optimizer is the fused AdamW, on the CPU it is not.
    model, examples = embedded()
    examples, steps = (examples[:4], 2) if at.small else (examples, RECIPE.steps)
    methods = ("dpo",) if at.small else ("dpo", "sft", "simpo", "orpo")
    kinds = [(f"{method}, {dtype}", {"method": method, "dtype": dtype}) for method in methods for dtype in ALLOWED]
    kinds += [("dpo, gradient checkpointing", {"gradient_checkpointing": True})]
    kinds += [("dpo, LoRA, bfloat16", {"dtype": "bfloat16", "lora": 8})]
    table, worst, exact = [], dict.fromkeys(ALLOWED, 0.0), {}
    for name, changes in kinds:
        recipe = replace(RECIPE, extractor="identity", steps=steps, **changes)
        if recipe.method not in exact:
            exact[recipe.method] = trained(copy.deepcopy(model).double(), examples, replace(recipe, dtype="float32"))
        right, direction = exact[recipe.method]
        own = copy.deepcopy(model).to(at.device)
        try:
            own = add_adapters(own.bfloat16(), recipe.lora, 0) if recipe.lora else own
        except InputError as error:  # without peft
            table.append([name, *[""] * 4, first_line(error)])
            continue
        losses, gradient = trained(own, examples, recipe)
        figures = [abs(a / b - 1) for a, b in zip(losses, right, strict=True)]
        if recipe.lora:  # adapters have a gradient of their own, and so other losses from the second step on
            figures = figures[:1]
        else:
            figures.append(((gradient - direction).norm() / direction.norm()).item())
        worst[recipe.dtype] = max(worst[recipe.dtype], *figures)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in own.parameters() if p.requires_grad}
        shown = [f"{figure:.0e}" for figure in figures] + [""] * (3 - len(figures))
        table.append([name, f"{right[0]:.6f}", *shown, ", ".join(dtypes)])
    columns = ["", "first loss, float64", "its error", "that of the last", "the gradient's", "weights trained in"]
    return {
        "columns": columns, "rows": table, "ok": all(worst[dtype] <= ALLOWED[dtype] for dtype in ALLOWED),
        "found": ", ".join(f"{dtype} {error:.0e}" for dtype, error in worst.items()),
        "goal": ", ".join(f"{dtype} within {error:.0e}" for dtype, error in ALLOWED.items()),
    }  # fmt: skip


def resume(at) -> dict:
    """A run that is killed and resumed, beside two whole ones"""
    steps, weights = 6 if at.small else 60, {}
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--steps {steps} --batch_size 4 --save_every 2 --mlc_weight 6 --mlc_layer 3 --device {at.device.type}"
        flags = f"{flags} --preset embedded --resume true --reference_cache {folder}/reference".split()
        checkpoint = Path(folder) / "killed/checkpoint.pt"
        command = [sys.executable, "-m", "mlc_min.train", *flags, "--output"]
        start = partial(subprocess.Popen, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = start([*command, str(checkpoint.parent)])
        try:
            while process.poll() is None and not checkpoint.exists():
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        place = last_good(checkpoint).split(";")[0].removeprefix(f"the last good checkpoint is {checkpoint}, ")
        runs = {name: start([*command, f"{folder}/{name}"]) for name in ("killed", "whole", "again")}
        for name, run in runs.items():  # each a process of its own, as the killed one was
            run.wait()
            weights[name] = load_file(f"{folder}/{name}/model/model.safetensors")

    def apart(name: str) -> float:
        return max((weights["whole"][key] - weights[name][key]).abs().max().item() for key in weights["whole"])

    killed, again = apart("killed"), apart("again")
    return {
        "columns": ["", "largest difference of a weight"], "note": f"Killed after {place} of {steps}.",
        "rows": [["killed and resumed", f"{killed:.1e}"], ["the whole run again", f"{again:.1e}"]],
        "found": f"{killed:.0e} from the whole run; that again {again:.0e}",
        "goal": "no more than ten times that", "ok": killed <= 10 * again,
    }  # fmt: skip


def waits(at) -> dict:
    """Waits of the host for the GPU in a training step: DPO+MLC, one micro-batch"""
    (model, examples), found = embedded(), Counter()
    recipe = replace(RECIPE, batch_size=16, mlc_parts=4, dtype="bfloat16")
    examples = loop.with_reference(model.to(at.device), examples, recipe)
    steps = loop.train(loop.Run.start(model, recipe), examples, recipe)
    next(steps)  # makes what stays, such as the optimizer's moments

    def note(message, *_, **__) -> None:
        stack = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        own = [frame for frame in stack if frame.filename.startswith(PACKAGE)]
        if own and "called a synchronizing" in str(message):
            who = "ours" if own[-1] is stack[-1] else f"{Path(stack[-1].filename).name}, called here"
            found[f"{Path(own[-1].filename).name}:{own[-1].lineno}", f"`{own[-1].line}`", who] += 1

    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        if at.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            next(steps)
        finally:
            if at.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    ours = sum(times for (*_, who), times in found.items() if who == "ours")
    return {
        "columns": ["line", "code", "who waits", "times"],
        "rows": [[*place, str(times)] for place, times in found.most_common()],
        "found": f"{ours} of ours, {sum(found.values()) - ours} of others",
        "goal": "at most one of ours", "ok": ours <= 1,
    }  # fmt: skip


def compiled(at) -> dict:
    """Layers that torch.compile has made: a DPO+MLC step"""
    shape, rows = ("tiny", 2) if at.small else ("qwen2.5-1.5b", 16)
    times, table = {}, []
    for name in ("eager", "compiled"):
        fresh(at.device)
        work, start = Workload.make(shape, rows, at.device, parts=2), time.perf_counter()
        if name == "compiled":
            for layer in work.model.get_decoder().layers:  # not the whole, whose pass a hook between layers may end
                layer.forward = torch.compile(layer.forward, dynamic=True)
        jobs = {uses: partial(lambda own, uses: own.step(own.loss(uses)), work, uses) for uses in (False, True)}
        jobs[True]()
        first = time.perf_counter() - start
        times[name] = alternate(jobs, at.repeats, at.device)
        config = work.model.config
        needed = dpo_operations(config, work.examples) + mlc_operations(config, work.examples, config.num_hidden_layers)
        speed, part = utilisation(needed, times[name][True], at.device)
        table.append([name, *(f"{median(times[name][uses]):.3g}" for uses in jobs), speed, f"{first:.0f}"])
    faster = median(times["eager"][True]) / median(times["compiled"][True])
    return {
        "columns": ["layers", "DPO, s", "DPO+MLC, s", "Tflop/s (of the peak)", "first step, s"], "rows": table,
        "found": f"{faster:.2f} times as fast, {100 * part:.0f} % of the peak", "goal": "40 % of the peak",
        "ok": part >= 0.4, "note": f"{shape}, {rows} rows, mlc_parts 2; dynamic shapes.",
    }  # fmt: skip


def counts_apart(ours: dict, theirs: dict) -> list[int]:
    """How far apart the counts of two summaries are: of each language, kind of prompt and verdict."""
    return [
        abs(cell[verdict] - theirs[code][kind][verdict])
        for code, cells in ours.items() for kind, cell in cells.items()
        for verdict in ("refusal", "compliance", "invalid")
    ]  # fmt: skip


def main_job(at) -> dict:
    """The rows of `python -m mlc_min`, seed 0, against the committed counts of a CPU"""
    committed = json.loads((ROOT / "data/results/ablations.json").read_text(encoding="utf-8"))["rows"]
    world, table, largest, seconds = World.load("test", at.device.type, 1 if at.small else None), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in MAIN[:2] if at.small else MAIN:
            with redirect_stdout(StringIO()):
                result = run(world, name, 0, Path(folder), steps=2 if at.small else TrainConfig.steps)
            ours, theirs = result["summary"], committed[name][0]["summary"]
            differences = counts_apart(ours["counts"], theirs["counts"])
            largest, seconds = max(largest, *differences), seconds + result["seconds"]
            moved = f"{sum(map(bool, differences))} of {len(differences)}"
            table.append([name, f"{ours['avg']:.1f}", f"{theirs['avg']:.1f}", moved, f"{max(differences)}",
                          f"{result['seconds']}"])  # fmt: skip
    return {
        "columns": ["", "Avg", "Avg of a CPU", "counts that differ", "by at most", "seconds"], "rows": table,
        "found": f"counts differ by {largest} at most; {seconds} s", "goal": "by one prompt of 100", "ok": largest <= 1,
    }  # fmt: skip


def port(at) -> dict:
    """The port to TRL under `accelerate launch`, one process, against our loop"""
    import trl  # noqa: F401  (without it this part is skipped)

    (model, examples), on_cpu = embedded(), at.device.type == "cpu"
    recipe = replace(RECIPE, sft_weight=0.0, warmup=0.25, log_every=1)
    ours, _ = trained(model.to(at.device), examples, recipe)
    lines, order = (EMBEDDED / "train.jsonl").read_text(encoding="utf-8").splitlines(), loop.row_order(16, recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(lines[next(order)] for _ in range(16)), encoding="utf-8")  # as our loop took them
        method = {name: getattr(recipe, name) for name in NAMES} | {"train": rows}
        settings = method | {
            "output_dir": f"{folder}/run", "use_cpu": on_cpu, "bf16": False, "gradient_checkpointing": False,
            "max_steps": 4, "save_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none",
            "train_sampling_strategy": "sequential", "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": "cosine", "warmup_steps": 1, "seed": recipe.seed,
        }  # fmt: skip
        launch = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no"
        launch += f" --dynamo_backend no{' --cpu' * on_cpu} -m mlc_min.ports.trl"
        command = [sys.executable, *launch.split(), *(f"--{name}={value}" for name, value in settings.items())]
        environment = os.environ | {"HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1", "CI": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if process.returncode:
            print(process.stderr, file=sys.stderr)
            raise RuntimeError(f"accelerate launch ended with {process.returncode}; what it said stands above")
        state = json.loads(Path(folder, "run/checkpoint-4/trainer_state.json").read_text(encoding="utf-8"))
    theirs = [line["loss"] for line in state["log_history"] if "loss" in line]
    worst = max(abs(a / b - 1) for a, b in zip(theirs, ours, strict=True))
    return {
        "columns": ["step", "loss, TRL", "loss, ours"],
        "rows": [[str(i), f"{a:.6f}", f"{b:.6f}"] for i, (a, b) in enumerate(zip(theirs, ours, strict=True))],
        "found": f"losses of four steps {worst:.0e} apart", "goal": f"within {ALLOWED['float32']:.0e}",
        "ok": worst <= ALLOWED["float32"],
    }  # fmt: skip


PARTS = (waits, agreement, main_job, parts.cost, resume, parts.official, parts.trl, port, compiled, parts.evaluation,
         parts.loss)  # fmt: skip


def main() -> None:
    run_parts(PARTS, "python -m tests.gpu", __doc__, needs_gpu=True)


if __name__ == "__main__":
    run_command(main)
