"""The parts of the benchmark. Each returns a table: {"columns": […], "rows": [[…], …], "goal": …, "note": …}."""

import copy
import csv
import gc
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer

from mlc_min.consistency import mlc_loss, singular_values, unit_rows
from mlc_min.evaluation.generate import generate
from mlc_min.examples import consistency_batch, encode_prompt, pad, preference_batch
from mlc_min.lab.benchmark.measure import InTurn, alternate, gigabytes, peak_memory, ratios, seconds, share, spread
from mlc_min.lab.benchmark.workloads import Workload, dpo_operations, make_examples, mlc_operations, official_loss
from mlc_min.lab.random_model import make_config, make_model
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES
from mlc_min.loop import batches_of, consistency_loss
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.states import last_token_states
from mlc_min.train import token_count


def cost(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """What MLC adds to a DPO step, beside what it has to add."""
    layers = make_config(shape).num_hidden_layers

    def row(layer: int, passes: int) -> list[str]:
        work = Workload.make(shape, rows, device, layer, passes)
        jobs = {"DPO": lambda: work.step(work.loss(False)), "DPO+MLC": lambda: work.step(work.loss(True))}
        times = alternate(jobs, repeats, device)
        peaks = [gigabytes(peak_memory(job, device)["peak"]) for job in jobs.values()]
        measured, config = ratios(times["DPO+MLC"], times["DPO"]), work.model.config
        added = mlc_operations(config, work.examples, layer) / dpo_operations(config, work.examples)
        above = f"{100 * (median(measured) / (1 + added) - 1):+.0f} %"
        place = f"layer {layer} of {layers}, mlc_parts {passes}"
        return [place, *map(seconds, times.values()), spread(measured), f"{1 + added:.2f}", above, *peaks]

    columns = ["MLC on", "DPO, s", "DPO+MLC, s", "ratio", "counted", "above it", "DPO, GB", "DPO+MLC, GB"]
    table = [row(layers, 4), row(layers, 1), row(layers // 2, 4)]
    return {"columns": columns, "rows": table, "goal": "ratio within 15 % of the counted one"}


def official(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Our DPO+MLC step against one laid out as in the official code."""
    work = Workload.make(shape, rows, device)
    reference_model = copy.deepcopy(work.model).requires_grad_(False)
    with torch.no_grad():
        difference = abs(work.loss().item() - official_loss(work, reference_model).item())
    jobs = {
        "ours": lambda: work.step(work.loss()),
        "official layout": lambda: work.step(official_loss(work, reference_model)),
    }
    times = alternate(jobs, repeats, device)
    memory = {"official layout": peak_memory(jobs["official layout"], device)}
    reference_model = None  # ours has none
    memory["ours"] = peak_memory(jobs["ours"], device)
    table = [[name, seconds(times[name]), *map(gigabytes, memory[name].values())] for name in jobs]
    shares = map(share, memory["official layout"].values(), memory["ours"].values())
    table.append(["official / ours", spread(ratios(times["official layout"], times["ours"])), *shares])
    size = f"{sum(p.numel() for p in work.model.parameters()) / 1e6:.0f} million parameters"
    note = f"{size}, vocabulary {work.model.config.vocab_size:,}; {rows} rows. The losses of the first step differ by "
    note += f"{difference:.0e}. Peak holds weights, gradients and moments."
    columns = ["", "seconds a step", "peak, GB", "of it for the step, GB"]
    return {"columns": columns, "rows": table, "note": note, "goal": "at least 3 times as fast, a third of the memory"}


def trl(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Our step against TRL's: plain DPO, and with MLC by `mlc_min/ports/trl.py`."""
    try:
        import trl as package
        from trl import DPOConfig

        from mlc_min.ports.trl import MLCConfig, MLCDPOTrainer, token_dataset
    except ImportError:
        return {"columns": [], "rows": [], "note": "TRL is not installed (`pip install -r requirements-trl.txt`)."}

    def row(name: str, weight: float, precomputed: bool) -> list[str]:
        work = Workload.make(shape, rows, device)
        model = copy.deepcopy(work.model)
        config = MLCConfig(languages=work.config.languages, mlc_weight=weight)
        # on the same data, in the same arithmetic, with the same optimizer; nothing saved, nothing logged
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(), max_steps=repeats + 2, per_device_train_batch_size=rows, learning_rate=1e-6,
            bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=precomputed, disable_tqdm=True,
            use_cpu=device.type == "cpu", report_to="none", save_strategy="no", logging_steps=10_000, max_grad_norm=1.0,
        )  # fmt: skip
        turns = InTurn(lambda: work.step(work.loss(uses_mlc=weight > 0)), device)
        options = {} if precomputed else {"ref_model": copy.deepcopy(model)}
        options |= {"processing_class": AutoTokenizer.from_pretrained(EMBEDDED / "model"), "callbacks": [turns]}
        MLCDPOTrainer(model, settings, config, token_dataset(work.examples, config), **options).train()
        (theirs, ours), (theirs_gb, ours_gb) = turns.seconds, turns.memory
        times = [seconds(theirs), seconds(ours), spread(ratios(theirs, ours))]
        return [name, *times, gigabytes(theirs_gb), gigabytes(ours_gb), share(theirs_gb, ours_gb)]

    kinds = (("DPO", 0.0, True), ("DPO, live reference", 0.0, False), ("DPO+MLC, our port", 0.8, True))
    columns = ["", "TRL, s", "ours, s", "TRL / ours", "TRL, GB for the step", "ours, GB for the step", "TRL / ours"]
    note = f"TRL {package.__version__}. Its reference log-probs are made beforehand but in the second row; ours always."
    table = [row(*kind) for kind in kinds]
    return {"columns": columns, "rows": table, "note": note, "goal": "at least as fast, at no more memory"}


def growth(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Seconds and memory of the MLC pass alone, forward and backward, as one thing grows and the rest stays."""
    standard = dict(languages=8, prompt=32, rows=rows, vocabulary=50_000, layer=None)
    layers = make_config(shape).num_hidden_layers
    ranges = {
        "languages": (2, 4, 8, 16, 32), "prompt": (16, 32, 64, 128), "rows": (1, 2, 4, 8, 16),
        "vocabulary": (10_000, 50_000, 150_000), "layer": sorted({max(1, layers * k // 4) for k in range(1, 5)}),
    }  # fmt: skip
    table, curves = [], {}
    for name, values in ranges.items():
        jobs, model = {}, None
        for value in values:
            size = standard | {name: value}
            if model is None or name == "vocabulary":
                model = make_model(shape, device, size["vocabulary"])
            examples = make_examples(size["rows"], size["vocabulary"], size["languages"], size["prompt"], vary=False)
            jobs[value] = mlc_pass(model, examples, size["layer"] or layers)
        times = alternate(jobs, repeats, device)
        added = [peak_memory(job, device)["added"] for job in jobs.values()]
        curves[name] = {"values": list(values), "seconds": list(map(median, times.values())), "added_gb": added}
        first, last = values[0], values[-1]
        proportional = 1 if name == "vocabulary" else last / first
        table.append([
            f"{name}: {first} to {last}", f"{seconds(times[first])} to {seconds(times[last])}",
            spread(ratios(times[last], times[first])), f"{proportional:.0f}",
            f"{gigabytes(added[0])} to {gigabytes(added[-1])}",
        ])  # fmt: skip
    columns = ["what grows", "seconds", "ratio", "if proportional", "added GB"]
    others = ", ".join(f"{name} {value}" for name, value in standard.items() if value)
    return {"columns": columns, "rows": table, "note": f"The others stay at: {others}, all layers.", "curves": curves,
            "goal": "linear, and flat in the vocabulary"}  # fmt: skip


def mlc_pass(model, examples, layer: int) -> Callable[[], float]:
    """The MLC loss of the examples and its gradient, as a job."""
    work = Workload(model, examples[:1], layer)  # the reference, which is not asked for, of one of them only
    return lambda: work.step(consistency_loss(model, work.extractor, examples, work.config), updates=False)


def sigma_by_gram(x: torch.Tensor) -> torch.Tensor:
    z = unit_rows(x)
    return torch.linalg.eigvalsh(z @ z.mT).clamp(min=0).sqrt().flip(-1)


WAYS = {
    "svdvals, float32 (ours)": singular_values,
    "svdvals, float64": lambda x: torch.linalg.svdvals(unit_rows(x).double()),
    "Gram matrix, float32": sigma_by_gram,
    "Gram matrix, float64": lambda x: sigma_by_gram(x.double()),
}
ON_THE_CPU = {"svdvals on the CPU": lambda x: torch.linalg.svdvals(unit_rows(x).cpu()).to(x.device)}


def loss_by(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    sigma = sigma_of(x)
    return -torch.log_softmax(sigma / sigma[:, :1].detach() / 0.2, -1)[:, 0].mean().float()


def gradient_of(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_by(sigma_of, x), x)[0]


def loss_alone(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Forward and backward of the loss, by ways to the singular values; and how right their gradients are."""
    ways = WAYS | (ON_THE_CPU if device.type == "cuda" else {})
    sizes = [(1, 10, 512), (16, 10, 512), (256, 10, 512), (16, 2, 512), (16, 32, 512), (16, 10, 64), (16, 10, 1024)]
    table: dict[str, list[str]] = {name: [name] for name in ways}

    def random(seed: int, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)

    def job(way: Callable, x: torch.Tensor, times: int) -> Callable:
        return lambda: [gradient_of(way, x) for _ in range(times)]

    for size in sizes:
        x, few = random(0, *size), max(1, 64 // size[0])  # a job of some milliseconds
        jobs = {name: job(way, x, few) for name, way in ways.items()}
        for name, times in alternate(jobs, max(7, repeats), device).items():
            table[name].append(f"{1000 * median(times) / few:.2f}")
    line, noise = random(1, 1, 1, 512), random(10, 1, 10, 512)
    for name, way in ways.items():
        for width in (1.0, 1e-2, 1e-4, 0.0):
            x = line + width * noise
            exact, got = gradient_of(singular_values, x.double()), gradient_of(way, x).double()
            error = f"{((got - exact).norm() / exact.norm()).item():.0e}" if width else "finite"
            table[name].append(error if torch.isfinite(got).all() else "NaN")
    x = line + noise
    assert mlc_loss(x).item() == loss_by(singular_values, x).item()  # the first row is the package's
    columns = ["milliseconds by (N, m, d)", *(f"{n}, {m}, {d}" for n, m, d in sizes)]
    columns += [f"gradient's error at spread {width}" for width in ("1", "0.01", "0.0001", "0")]
    return {"columns": columns, "rows": list(table.values()), "goal": "the fastest that loses no accuracy"}


def evaluation(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Generated tokens a second, embedded model, prompts of all twelve languages in random order."""
    model, tokenizer = load_model(EMBEDDED / "model", device)
    test_rows = read_rows(EMBEDDED / "validation.jsonl", LANGUAGES)[::4]
    prompts = [encode_prompt(tokenizer, row.prompts[language]) for row in test_rows for language in LANGUAGES]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompts[i] for i in order]
    ours = partial(generate, model, tokenizer, max_new_tokens=48)

    @torch.no_grad()
    def plain(batch_size):
        for batch in batches_of(prompts, batch_size):
            batch = {name: tensor.to(device) for name, tensor in pad(batch, side="left").items()}
            model.generate(**batch, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)

    jobs = {
        "ours, batches of 256": partial(ours, prompts, batch_size=256),
        "ours, batches of 64": partial(ours, prompts, batch_size=64),
        "model.generate, unsorted batches of 64": partial(plain, 64),
        "one by one": partial(ours, prompts[:60], batch_size=1),
    }
    times = alternate(jobs, repeats, device)
    replies = jobs["ours, batches of 256"]()
    tokens = [len(tokenizer.encode(r["reply"], add_special_tokens=False)) + r["ended"] for r in replies]
    count = dict.fromkeys(jobs, sum(tokens)) | {"one by one": sum(tokens[:60])}
    rates = {name: [count[name] / t for t in times[name]] for name in jobs}
    first = rates["ours, batches of 256"]
    table = [[name, f"{median(rate):,.0f}", spread(ratios(first, rate))] for name, rate in rates.items()]
    note = f"{len(prompts)} prompts, {sum(tokens):,} tokens of replies, end tokens included."
    return {"columns": ["", "tokens a second", "ours / this"], "rows": table, "note": note}


# Multiplications and additions a second in dense bfloat16, in float32 for none of them, as published by the maker.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def utilisation(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """A training step beside the plain forward and backward pass of the model on the same tokens, as the ceiling."""
    on_gpu = device.type == "cuda"
    name_of_gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    peak = next((value for name, value in PEAK.items() if name in name_of_gpu), None)
    half = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)

    def row(name: str) -> list[str]:
        gc.collect()
        torch.cuda.empty_cache()  # of the model before; nothing on a CPU
        lean = name == "qwen2.5-7b"  # 16 bytes a parameter would not fit: plain gradients, no optimizer
        work = Workload.make(name, rows, device, dtype=torch.bfloat16 if lean else torch.float32)
        model, examples, config = work.model, work.examples, work.model.config
        replies, prompts = preference_batch(examples), consistency_batch(examples, work.config.language_list)
        batch = {key: replies[key].to(device) for key in ("input_ids", "attention_mask")}

        def training():
            with half:
                loss = work.loss()
            work.step(loss, updates=not lean)

        def plain():
            # What no trainer can do without: the layers' forward and backward passes, padding included.
            with half:
                states = model.get_decoder()(**batch, use_cache=False).last_hidden_state
                last = last_token_states(model, prompts["input_ids"], prompts["attention_mask"])
                loss = states.float().square().mean() + last.float().square().mean()
            work.step(loss, updates=False)

        times = alternate({"training": training, "plain": plain}, repeats, device)
        tokens = sum(token_count(e, "dpo", True) for e in examples)
        cells = [name + (", no optimizer" if lean else ""), f"{tokens / median(times['training']):,.0f}"]
        for key in times:  # the layers alone have no head
            operations = dpo_operations(config, examples, head=key == "training")
            operations += mlc_operations(config, examples, config.num_hidden_layers)
            rate = operations / median(times[key])
            cells.append(f"{rate / 1e12:.2g}" + (f" ({100 * rate / peak:.0f} %)" if peak else ""))
        return [*cells, spread(ratios(times["training"], times["plain"]))]

    columns = ["DPO+MLC", "tokens a second", "needed Tflop/s (of the peak)", "layers alone, Tflop/s"]
    columns.append("step / layers alone")
    table = [row(name) for name in (("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b") if on_gpu else (shape,))]
    note = "Layers alone: forward and backward of the same padded batches, no head, no loss, no optimizer."
    return {"columns": columns, "rows": table, "note": note}


def reading(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Seconds of the CPU's time to read 100,000 rows of ten languages, in each format."""
    lines = (EMBEDDED / "train.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [
        {name: value[0]["value"] if isinstance(value, list) else value["value"]
         for name, value in json.loads(line).items() if name.startswith(("prompt", "chosen", "rejected"))}
        for line in lines
    ]  # fmt: skip
    chosen = [i % len(lines) for i in range(100_000)]
    many, as_csv = [lines[i] for i in chosen], StringIO()
    writer = csv.DictWriter(as_csv, list(plain[0]))
    writer.writeheader()
    writer.writerows(plain[i] for i in chosen)
    texts = {"jsonl": "\n".join(many), "json": f"[{', '.join(many)}]", "csv": as_csv.getvalue()}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for ending, text in texts.items():
            path = Path(folder) / f"rows.{ending}"
            path.write_text(text, encoding="utf-8", newline="")
            times = []
            for _ in range(repeats):
                start = time.process_time()
                assert len(read_rows(path, ALIGNED, ("chosen", "rejected"))) == len(many)
                times.append(time.process_time() - start)
            table.append([ending, seconds(times), f"{path.stat().st_size / 1e6:.0f}"])
    return {"columns": ["100,000 rows as", "seconds", "MB"], "rows": table, "goal": "under 10 s"}
