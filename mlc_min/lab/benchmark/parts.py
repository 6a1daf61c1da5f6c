"""The parts of the benchmark. Each returns a table: {"columns": […], "rows": [[…], …], "goal": …, "note": …}."""

import copy
import csv
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from mlc_min.consistency import mlc_loss, singular_values, unit_rows
from mlc_min.evaluation.generate import generate
from mlc_min.examples import consistency_batch, encode_prompt, pad, preference_batch
from mlc_min.lab.benchmark.measure import alternate, gigabytes, peak_memory, ratio, seconds, share, spread
from mlc_min.lab.benchmark.workloads import (
    Workload,
    alignment_operations,
    consistency_operations,
    forward_operations,
    make_examples,
    make_model,
    official_loss,
)
from mlc_min.lab.random_model import make_config
from mlc_min.lab.sentences import ALIGNED, EMBEDDED, LANGUAGES
from mlc_min.loop import consistency_loss
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.states import last_token_states, resolve_layer
from mlc_min.train import token_count


def cost(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """What MLC adds to a DPO step, beside what it has to add."""
    table = []
    for layer, passes in ((-1, 4), (-1, 1), ("half", 4)):
        model = make_model(shape, device)
        layers = model.config.num_hidden_layers
        layer = resolve_layer(model, layers // 2 if layer == "half" else layer)
        work = Workload.make(model, make_examples(rows, model.config.vocab_size), layer, passes)
        jobs = {
            "DPO": lambda work=work: work.step(work.loss(uses_mlc=False)),
            "DPO+MLC": lambda work=work: work.step(work.loss(uses_mlc=True)),
        }
        times = alternate(jobs, repeats, device)
        peaks = [gigabytes(peak_memory(job, device)["peak"]) for job in jobs.values()]
        measured, align = ratio(times["DPO+MLC"], times["DPO"]), alignment_operations(model.config, work.examples)
        counted = 1 + consistency_operations(model.config, work.examples, layer) / align
        above = f"{100 * (measured['median'] / counted - 1):+.0f} %"
        place = f"layer {layer} of {layers}, mlc_parts {passes}"
        table.append([place, *map(seconds, times.values()), spread(measured), f"{counted:.2f}", above, *peaks])
        del model, work, jobs
    columns = ["MLC on", "DPO, s", "DPO+MLC, s", "ratio", "counted", "above it", "DPO, GB", "DPO+MLC, GB"]
    return {"columns": columns, "rows": table, "goal": "ratio within 15 % of the counted one"}


def official(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Our DPO+MLC step against one laid out as in the official code."""
    model = make_model(shape, device)
    work = Workload.make(model, make_examples(rows, model.config.vocab_size))
    reference_model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        difference = abs(work.loss(uses_mlc=True).item() - official_loss(work, reference_model).item())
    jobs = {
        "ours": lambda: work.step(work.loss(uses_mlc=True)),
        "official layout": lambda: work.step(official_loss(work, reference_model)),
    }
    times = alternate(jobs, repeats, device)
    memory = {"official layout": peak_memory(jobs["official layout"], device)}
    reference_model = None  # ours has none
    gc.collect()
    memory["ours"] = peak_memory(jobs["ours"], device)
    table = [
        [name, seconds(times[name]), *(gigabytes(memory[name][key]) for key in ("peak", "added"))] for name in jobs
    ]
    shares = [share(memory["official layout"][key], memory["ours"][key]) for key in ("peak", "added")]
    table.append(["official / ours", spread(ratio(times["official layout"], times["ours"])), *shares])
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters"
    note = f"{size}, vocabulary {model.config.vocab_size:,}; {rows} rows. The losses of the first step differ by "
    note += f"{difference:.0e}. Peak holds weights, gradients and moments."
    columns = ["", "seconds a step", "peak, GB", "of it for the step, GB"]
    return {"columns": columns, "rows": table, "note": note, "goal": "at least 3 times as fast, a third of the memory"}


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
        medians = [median(times[value]) for value in values]
        curves[name] = {"values": list(values), "seconds": medians, "added_gb": added}
        first, last = values[0], values[-1]
        proportional = 1 if name == "vocabulary" else last / first
        memory = f"{gigabytes(added[0])} to {gigabytes(added[-1])}"
        grown = spread(ratio(times[last], times[first]))
        range_of_seconds = f"{medians[0]:.3g} to {medians[-1]:.3g}"
        table.append([f"{name}: {first} to {last}", range_of_seconds, grown, f"{proportional:.0f}", memory])
    columns = ["what grows", "seconds", "ratio", "if proportional", "added GB"]
    others = ", ".join(f"{name} {value}" for name, value in standard.items() if value)
    return {"columns": columns, "rows": table, "note": f"The others stay at: {others}, all layers.", "curves": curves,
            "goal": "linear, and flat in the vocabulary"}  # fmt: skip


def mlc_pass(model, examples, layer: int) -> Callable[[], None]:
    work = Workload.make(model, examples[:1], layer)

    def job():
        consistency_loss(model, work.extractor, examples, work.config).backward()
        work.optimizer.zero_grad(set_to_none=True)

    return job


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
    loss_by(sigma_of, x).backward()
    return x.grad


def loss_alone(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Forward and backward of the loss, by ways to the singular values; and how right their gradients are."""
    ways = WAYS | (ON_THE_CPU if device.type == "cuda" else {})
    sizes = [(1, 10, 512), (16, 10, 512), (256, 10, 512), (16, 2, 512), (16, 32, 512), (16, 10, 64), (16, 10, 1024)]
    table: dict[str, list[str]] = {name: [name] for name in ways}
    for n, m, d in sizes:
        x = torch.randn(n, m, d, generator=torch.Generator().manual_seed(0)).to(device)
        few = max(1, 64 // n)  # a job of some milliseconds
        jobs = {
            name: lambda way=way, x=x, few=few: [gradient_of(way, x) for _ in range(few)] for name, way in ways.items()
        }
        for name, times in alternate(jobs, max(7, repeats), device).items():
            table[name].append(f"{1000 * median(times) / few:.2f}")
    line, noise = (torch.randn(1, k, 512, generator=torch.Generator().manual_seed(k)).to(device) for k in (1, 10))
    for name, way in ways.items():
        for width in (1.0, 1e-2, 1e-4, 0.0):
            x = line + width * noise
            exact, got = gradient_of(singular_values, x.double()), gradient_of(way, x).double()
            error = f"{((got - exact).norm() / exact.norm()).item():.0e}" if width else "finite"
            table[name].append(error if torch.isfinite(got).all() else "NaN")
    assert (
        mlc_loss(line + noise).item() == loss_by(singular_values, line + noise).item()
    )  # the first row is the package's
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

    def ours(chosen, batch_size):
        return generate(model, tokenizer, chosen, 48, batch_size)

    @torch.no_grad()
    def plain(batch_size):
        for start in range(0, len(prompts), batch_size):
            batch = pad(prompts[start : start + batch_size], side="left")
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            model.generate(**batch, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)

    jobs = {
        "ours, batches of 256": lambda: ours(prompts, 256),
        "ours, batches of 64": lambda: ours(prompts, 64),
        "model.generate, unsorted batches of 64": lambda: plain(64),
        "one by one": lambda: ours(prompts[:60], 1),
    }
    times = alternate(jobs, repeats, device)
    tokens = [len(tokenizer.encode(r["reply"], add_special_tokens=False)) + r["ended"] for r in ours(prompts, 256)]
    count = {name: sum(tokens[:60] if name == "one by one" else tokens) for name in jobs}
    rates = {name: [count[name] / t for t in times[name]] for name in jobs}
    table = [
        [name, f"{median(rate):,.0f}", spread(ratio(rates["ours, batches of 256"], rate))]
        for name, rate in rates.items()
    ]
    note = f"{len(prompts)} prompts, {sum(tokens):,} tokens of replies, end tokens included."
    return {"columns": ["", "tokens a second", "ours / this"], "rows": table, "note": note}


# Multiplications and additions a second in dense bfloat16, in float32 for none of them, as published by the maker.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def utilisation(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """A training step beside the plain forward and backward pass of the model on the same tokens, as the ceiling."""
    on_gpu = device.type == "cuda"
    shapes = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b") if on_gpu else (shape,)
    name_of_gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    peak = next((value for name, value in PEAK.items() if name in name_of_gpu), None)
    table = []
    for name in shapes:
        lean = name == "qwen2.5-7b"  # 16 bytes a parameter would not fit: plain gradients, no optimizer
        model = make_model(name, device, dtype=torch.bfloat16 if lean else torch.float32)
        work = Workload.make(model, make_examples(rows, model.config.vocab_size))
        replies, prompts = preference_batch(work.examples), consistency_batch(work.examples, work.config.language_list)
        batch = {key: replies[key].to(device) for key in ("input_ids", "attention_mask")}

        def training(work=work, lean=lean):
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = work.loss(uses_mlc=True)
            if not lean:
                return work.step(loss)
            loss.backward()
            work.optimizer.zero_grad(set_to_none=True)

        def plain(model=model, batch=batch, prompts=prompts):
            # What no trainer can do without: the layers' forward and backward passes, padding included.
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                states = model.get_decoder()(**batch, use_cache=False).last_hidden_state
                last = last_token_states(model, prompts["input_ids"], prompts["attention_mask"])
                loss = states.float().square().mean() + last.float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)

        times = alternate({"training": training, "plain": plain}, repeats, device)
        tokens = sum(token_count(e, "dpo", True) for e in work.examples)
        needed = alignment_operations(model.config, work.examples)
        needed += consistency_operations(model.config, work.examples, model.config.num_hidden_layers)
        head = 3 * forward_operations(model.config, [], 0, sum(len(e.chosen) + len(e.rejected) for e in work.examples))
        row = [name + (", no optimizer" if lean else ""), f"{tokens / median(times['training']):,.0f}"]
        for key, operations in (("training", needed), ("plain", needed - head)):
            rate = operations / median(times[key])
            row.append(f"{rate / 1e12:.2g}" + (f" ({100 * rate / peak:.0f} %)" if peak else ""))
        table.append([*row, spread(ratio(times["training"], times["plain"]))])
        del model, work, batch, training, plain
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    columns = [
        "DPO+MLC",
        "tokens a second",
        "needed Tflop/s (of the peak)",
        "layers alone, Tflop/s",
        "step / layers alone",
    ]
    note = "Layers alone: forward and backward of the same padded batches, no head, no loss, no optimizer."
    return {"columns": columns, "rows": table, "note": note}


def reading(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Seconds of the CPU's time to read 100,000 rows of ten languages, in each format."""
    lines = (EMBEDDED / "train.jsonl").read_text(encoding="utf-8").splitlines()
    many = [json.loads(lines[i % len(lines)]) for i in range(100_000)]
    texts = ("prompt", "chosen", "rejected")
    plain = [
        {name: value[0]["value"] if isinstance(value, list) else value["value"]
         for name, value in row.items() if name.startswith(texts)}
        for row in many
    ]  # fmt: skip
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("jsonl", "json", "csv"):
            path = Path(folder) / f"rows.{ending}"
            with path.open("w", encoding="utf-8", newline="") as file:
                if ending == "jsonl":
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in many)
                elif ending == "json":
                    json.dump(many, file, ensure_ascii=False)
                else:
                    writer = csv.DictWriter(file, list(plain[0]))
                    writer.writeheader()
                    writer.writerows(plain)
            times = []
            for _ in range(repeats):
                start = time.process_time()
                assert len(read_rows(path, ALIGNED, ("chosen", "rejected"))) == len(many)
                times.append(time.process_time() - start)
            table.append([ending, seconds(times), f"{path.stat().st_size / 1e6:.0f}"])
    return {"columns": ["100,000 rows as", "seconds", "MB"], "rows": table, "goal": "under 10 s"}
