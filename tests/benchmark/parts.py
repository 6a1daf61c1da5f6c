"""How fast, how much memory. A part takes the command's flags and returns a table, {"columns": […], "rows": [[…], …]},
with "found", in a few words, "goal", what was hoped for, "ok", whether that is so, and "note". Its docstring is its
title."""

import copy
import csv
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer

from mlc_min.consistency import singular_values, unit_rows
from mlc_min.evaluation.generate import generate
from mlc_min.examples import encode_prompt
from mlc_min.lab.random_model import make_config
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES
from mlc_min.machinery.errors import InputError, first_line
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows
from tests.benchmark.measure import CARDS, Job, alternate, fresh, measured, ratios, share, spread, utilisation
from tests.benchmark.workloads import Workload, dpo_operations, mlc_operations, official_loss


def cost(at) -> dict:
    """Cost of MLC: a DPO+MLC step over a DPO step"""
    kinds = [(at.shape, at.rows, 1, 4, 0), (at.shape, at.rows, 1, 1, 0), (at.shape, at.rows, 2, 4, 0)]
    if at.for_gpu:
        shapes = ("tiny",) if at.small else ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
        kinds = [(shape, at.rows, 1, parts, 0) for shape in shapes[:2] for parts in (4, 2, 1)]
        kinds += [(shapes[-1], at.rows, 1, parts, 16) for parts in (4, 1)] + [(shapes[-1], at.rows, 1, 4, 0)]
        kinds += [(shapes[1], rows, 1, 4, lora) for lora in (0, 16) for rows in (4, 16, 24) if not at.small]
    excess, used = [], [0.0]

    def row(shape: str, rows: int, divisor: int, parts: int, lora: int) -> list[str]:
        config, of_model = make_config(shape), f"{shape}, {rows} rows, {'LoRA, ' if lora else ''}" if at.for_gpu else ""
        layer = config.num_hidden_layers // divisor
        name = f"{of_model}layer {layer} of {config.num_hidden_layers}, mlc_parts {parts}"
        fresh(at.device, max(CARDS) if parts == 4 else math.inf)
        try:
            work = Workload.make(shape, rows, at.device, layer, parts, lora)
            jobs = {"DPO": lambda: work.step(work.loss(False)), "DPO+MLC": lambda: work.step(work.loss(True))}
            times, peaks, _ = measured(jobs, at)
        except (torch.OutOfMemoryError, InputError) as error:  # InputError: without peft
            return [name, first_line(error)[:40], *[""] * 8]
        counted, extra = dpo_operations(config, work.examples), mlc_operations(config, work.examples, layer)
        ratio, expected = ratios(times["DPO+MLC"], times["DPO"]), 1 + extra / counted
        above = median(ratio) / expected - 1
        # With adapters nothing needs the gradient of the weights, which is a third of the operations.
        speed, part = utilisation((counted + extra) * (2 / 3 if lora else 1), times["DPO+MLC"], at.device)
        used.append(part)
        excess.extend([above] * (parts == 4))
        peak = peaks["DPO+MLC"] or math.inf
        card = next((f"{card} GB" for card in CARDS if 1.05 * peak + 1 < card), "")
        cells = [f"{median(own):.3g}" for own in times.values()] + [spread(ratio), f"{expected:.2f}"]
        return [name, *cells, f"{100 * above:+.0f} %", *map(share, peaks.values()), speed, card]

    columns = ["MLC on", "DPO, s", "DPO+MLC, s", "ratio", "counted", "above it", "DPO, GB", "DPO+MLC, GB"]
    table = [row(*kind) for kind in kinds]
    found, goal = f"{100 * max(excess):+.0f} % with mlc_parts 4", "ratio within 15 % of the counted one"
    note = "A step fits a card if its peak, 5 % and 1 GB are less than the card has."
    if at.for_gpu:
        found, goal = f"{found}, {100 * max(used):.0f} % of the peak", f"{goal}, 40 % of the peak with some batch"
        note += f" With mlc_parts 4 none was given more than {max(CARDS)} GB."
    return {"columns": [*columns, "Tflop/s (of the peak)", "fits"], "rows": table, "found": found, "goal": goal,
            "note": note, "ok": max(excess) <= 0.15 and (max(used) >= 0.4 or not at.for_gpu)}  # fmt: skip


def official(at) -> dict:
    """Against the official layout"""
    work = Workload.make(at.shape, at.rows, at.device, parts=at.mlc_parts)
    with torch.no_grad():  # before the first step the model is its own reference
        difference = abs(work.loss().item() - official_loss(work, work.model).item())
    theirs = partial(lambda reference: work.step(official_loss(work, reference)), copy.deepcopy(work.model))
    jobs = {"official layout": theirs, "ours": lambda: work.step(work.loss())}
    del theirs  # and with it the reference model, once it was measured: ours has none
    times, peaks, added = measured(jobs, at)
    names = ("ours", "official layout")
    table = [[name, f"{median(times[name]):.3g}", share(peaks[name]), share(added[name])] for name in names]
    slower, shares = ratios(*times.values()), [share(*memory.values()) for memory in (peaks, added)]
    table.append(["official / ours", spread(slower), *shares])
    size = f"{sum(p.numel() for p in work.model.parameters()) / 1e6:.0f} million parameters"
    note = f"{size}, vocabulary {work.model.config.vocab_size:,}; {at.rows} rows, mlc_parts {at.mlc_parts}. The losses "
    note += f"of the first step differ by {difference:.0e}. Peak holds weights, gradients and moments."
    return {"columns": ["", "seconds a step", "peak, GB", "of it for the step, GB"], "rows": table, "note": note,
            "found": f"{median(slower):.2f} times as fast, {shares[0]} of the memory", "ok": median(slower) >= 3,
            "goal": "at least 3 times as fast, a third of the memory"}  # fmt: skip


def trl(at) -> dict:
    """Against TRL's DPOTrainer"""
    import trl as package
    from trl import DPOConfig

    from mlc_min.ports.trl import MLCConfig, MLCDPOTrainer, token_dataset

    def step_of_trl(work: Workload, weight: float, precomputed: bool) -> Job:
        """A step of the trainer on the same batch, in the same arithmetic, with an optimizer of the same kind."""
        config = MLCConfig(languages=work.config.languages, mlc_weight=weight)
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=at.rows, precompute_ref_log_probs=precomputed,
            bf16=at.device.type == "cuda", use_cpu=at.device.type == "cpu", gradient_checkpointing=False,
            learning_rate=1e-6, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        options = {} if precomputed else {"ref_model": copy.deepcopy(work.model)}
        options["processing_class"] = AutoTokenizer.from_pretrained(EMBEDDED / "model")
        dataset = token_dataset(work.examples, config)
        trainer = MLCDPOTrainer(copy.deepcopy(work.model), settings, config, dataset, **options)
        trainer.create_optimizer()
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1  # as its `train` would set it
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> None:
            trainer.training_step(model, dict(batch))
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def row(name: str, weight: float, precomputed: bool) -> list[str]:
        fresh(at.device)
        work = Workload.make(at.shape, at.rows, at.device, parts=at.mlc_parts)
        jobs = {"TRL": step_of_trl(work, weight, precomputed), "ours": lambda: work.step(work.loss(weight > 0))}
        times, _, added = measured(jobs, at)
        slower = ratios(*times.values())
        least.append(median(slower))
        seconds = [f"{median(own):.3g}" for own in times.values()]
        return [name, *seconds, spread(slower), *map(share, added.values()), share(*added.values())]

    least: list[float] = []
    kinds = (("DPO", 0.0, True), ("DPO, live reference", 0.0, False), ("DPO+MLC, our port", 0.8, True))
    columns = ["", "TRL, s", "ours, s", "TRL / ours", "TRL, GB for the step", "ours, GB for the step", "TRL / ours"]
    note = f"TRL {package.__version__}; reference log-probs made beforehand but for its second row. {at.rows} rows; "
    note += f"mlc_parts {at.mlc_parts}, the port 1."
    return {"columns": columns, "rows": [row(*kind) for kind in kinds], "note": note, "ok": min(least) >= 1,
            "found": f"TRL takes at least {min(least):.2f} times as long", "goal": "at least as fast"}  # fmt: skip


def sigma_by_gram(x: torch.Tensor) -> torch.Tensor:
    z = unit_rows(x)
    return torch.linalg.eigvalsh(z @ z.mT).clamp(min=0).sqrt().flip(-1)


def sigma_by_constant_vectors(x: torch.Tensor) -> torch.Tensor:
    """σⱼ = uⱼᵀ Z vⱼ, with the singular vectors taken as constants. As dσⱼ = uⱼᵀ dZ vⱼ, the gradient is exact all the
    same, and no decomposition is differentiated. Zᵀ = Q R brings the SVD down from m × d to m × m."""
    z = unit_rows(x)
    with torch.no_grad():
        q, r = torch.linalg.qr(z.mT)
        u, _, vh = torch.linalg.svd(r.mT, full_matrices=False)
        v = q @ vh.mT  # (N, d, min(m, d))
    return (u * (z @ v)).sum(-2)


OURS = "svdvals, float32 (ours)"
WAYS = {
    OURS: singular_values,
    "svdvals, float64": lambda x: torch.linalg.svdvals(unit_rows(x).double()),
    "svdvals on the CPU": lambda x: torch.linalg.svdvals(unit_rows(x).cpu()).to(x.device),
    "Gram matrix, float32": sigma_by_gram,
    "Gram matrix, float64": lambda x: sigma_by_gram(x.double()),
    "QR, SVD of m × m, constant vectors": sigma_by_constant_vectors,
}


def loss_by(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    sigma = sigma_of(x)
    return -torch.log_softmax(sigma / sigma[:, :1].detach() / 0.2, -1)[:, 0].mean().float()


def gradient_of(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_by(sigma_of, x), x)[0]


def loss(at) -> dict:
    """The loss alone, by ways to the singular values"""
    sizes = [(1, 10, 512), (16, 10, 512), (256, 10, 512), (16, 2, 512), (16, 32, 512), (16, 10, 64), (16, 10, 1024)]
    if at.for_gpu:
        sizes = [(8, 10, 512), (32, 10, 512), (256, 10, 512), (8, 10, 4096), (32, 30, 4096), (256, 30, 4096)]
        sizes = [(2, 3, 8), (2, 10, 64)] if at.small else sizes
    table, total, errors = {name: [name] for name in WAYS}, dict.fromkeys(WAYS, 0.0), {name: [] for name in WAYS}

    def random(seed: int, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(at.device)

    def job(way: Callable, x: torch.Tensor, times: int) -> Job:
        return lambda: [gradient_of(way, x) for _ in range(times)]

    for size in sizes:
        x, few = random(0, *size), 1 if at.small else max(1, 64 // size[0])  # a job of some milliseconds
        jobs = {name: job(way, x, few) for name, way in WAYS.items()}
        for name, times in alternate(jobs, 1 if at.for_gpu else at.repeats, at.device).items():
            total[name] += 1000 * median(times) / few
            table[name].append(f"{1000 * median(times) / few:.2f}")
    line, noise = random(1, 1, 1, 512), random(10, 1, 10, 512)
    for width in (1.0, 1e-2, 1e-4, 0.0):
        x = line + width * noise
        right = gradient_of(singular_values, x.double())
        for name, way in WAYS.items():
            got = gradient_of(way, x).double()
            error = (got - right).norm() / right.norm() if width else 0 * got.norm()  # at 0 only NaN is wrong
            errors[name].append(error.nan_to_num(math.inf).item())
            table[name].append("NaN" if got.isnan().any() else f"{error:.0e}" if width else "finite")
    exact = [name for name in WAYS if all(a <= 2 * b for a, b in zip(errors[name], errors[OURS], strict=True))]
    best = min(exact, key=total.get)
    columns = ["milliseconds by (N, m, d)", *(", ".join(map(str, size)) for size in sizes)]
    columns += [f"gradient's error at spread {width}" for width in ("1", "0.01", "0.0001", "0")]
    return {"columns": columns, "rows": list(table.values()), "goal": "ours is the fastest that is as exact, or nearly",
            "found": f"{best} takes {total[best] / total[OURS]:.2f} of our time",
            "ok": total[OURS] <= 1.25 * total[best]}  # fmt: skip


def evaluation(at) -> dict:
    """Evaluation: generated tokens a second, and whether a reply depends on its batch"""
    # For a GPU in bfloat16, as mlc_min.safety loads it there. Prompts of all twelve languages, in random order.
    model, tokenizer = load_model(EMBEDDED / "model", at.device, torch.bfloat16 if at.for_gpu else torch.float32)
    rows = read_rows(EMBEDDED / "validation.jsonl", LANGUAGES)[:: 200 if at.small else 4]
    prompts = [encode_prompt(tokenizer, row.prompts[language]) for row in rows for language in LANGUAGES]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompts[i] for i in order]
    sizes, replies = {"batches of 256": prompts, "batches of 64": prompts, "one by one": prompts[:60]}, {}

    def job(name: str, own: list, size: int) -> None:
        replies[name] = generate(model, tokenizer, own, 48, size)

    jobs = {name: partial(job, name, sizes[name], size) for name, size in zip(sizes, (256, 64, 1), strict=True)}
    times = alternate(jobs, 1 if at.for_gpu else at.repeats, at.device)
    whole, alone = replies["batches of 256"], replies["one by one"]
    tokens = [len(tokenizer.encode(r["reply"], add_special_tokens=False)) + r["ended"] for r in whole]
    rates = {name: [sum(tokens[: len(sizes[name])]) / t for t in times[name]] for name in sizes}
    table = [[name, f"{median(r):,.0f}", spread(ratios(rates["batches of 256"], r))] for name, r in rates.items()]
    others = sum(a != b for a, b in zip(whole, alone, strict=False))
    return {"columns": ["", "tokens a second", "batches of 256 / this"], "rows": table,
            "note": f"{len(prompts)} prompts, {sum(tokens):,} tokens of replies, end tokens included.",
            "found": f"{others} of {len(alone)} replies are others one by one", "goal": "none; in bfloat16 1 in 20",
            "ok": others <= at.for_gpu * len(alone) / 20}  # fmt: skip


def reading(at) -> dict:
    """Reading rows: seconds of the CPU's time for 100,000 rows of ten languages"""
    lines = (EMBEDDED / "train.jsonl").read_text(encoding="utf-8").splitlines()
    many, as_csv = [lines[i % len(lines)] for i in range(100_000)], StringIO()
    plain = [
        {name: value[0]["value"] if isinstance(value, list) else value["value"]
         for name, value in json.loads(line).items() if name.startswith(("prompt", "chosen", "rejected"))}
        for line in lines
    ]  # fmt: skip
    writer = csv.DictWriter(as_csv, list(plain[0]))
    writer.writeheader()
    writer.writerows(plain[i % len(plain)] for i in range(len(many)))
    texts = {"jsonl": "\n".join(many), "json": f"[{', '.join(many)}]", "csv": as_csv.getvalue()}
    table, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for ending, text in texts.items():
            path, times = Path(folder) / f"rows.{ending}", []
            path.write_text(text, encoding="utf-8", newline="")
            for _ in range(at.repeats):
                start = time.process_time()
                assert len(read_rows(path, ALIGNED, ("chosen", "rejected"))) == len(many)
                times.append(time.process_time() - start)
            table.append([ending, f"{median(times):.3g}", f"{path.stat().st_size / 1e6:.0f}"])
            slowest = max(slowest, median(times))
    return {"columns": ["100,000 rows as", "seconds", "MB"], "rows": table, "ok": slowest < 10,
            "found": f"{slowest:.3g} s at most", "goal": "under 10 s"}  # fmt: skip
