"""The parts of the benchmark. Each returns a table: {"columns": […], "rows": [[…], …], "goal": …, "note": …}."""

import copy
import gc
from collections.abc import Callable
from statistics import median

import torch

from mlc_min.consistency import mlc_loss, singular_values, unit_rows
from mlc_min.evaluation.generate import generate
from mlc_min.examples import consistency_batch, encode_prompt, pad
from mlc_min.lab.benchmark.measure import alternate, peak_memory, ratio
from mlc_min.lab.benchmark.official_layout import official_loss
from mlc_min.lab.benchmark.workloads import (
    Workload,
    alignment_operations,
    consistency_operations,
    forward_operations,
    layer_of,
    make_examples,
    make_model,
)
from mlc_min.lab.random_model import make_config
from mlc_min.lab.sentences import EMBEDDED, LANGUAGES
from mlc_min.loop import consistency_loss
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows
from mlc_min.states import last_token_states
from mlc_min.train import token_count


def seconds(values: list[float]) -> str:
    return f"{median(values):.3g}"


def spread(values: dict[str, float]) -> str:
    """A ratio with its range.

    >>> spread({"median": 3.0, "low": 2.0, "high": 4.0})
    '3.00 (2.00 to 4.00)'
    """
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def gigabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def share(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{part / whole:.2f}"


# --- 1 ---


def cost(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """What MLC adds to a DPO step, beside what it has to add."""
    table = []
    for layer, passes in ((-1, 4), (-1, 1), ("half", 4)):
        model = make_model(shape, device)
        layer = model.config.num_hidden_layers // 2 if layer == "half" else layer
        work = Workload.make(model, make_examples(rows, model.config.vocab_size), layer, passes)
        jobs = {
            "DPO": lambda work=work: work.step(work.loss(uses_mlc=False)),
            "DPO+MLC": lambda work=work: work.step(work.loss(uses_mlc=True)),
        }
        times = alternate(jobs, repeats, device)
        memory = {name: peak_memory(job, device) for name, job in jobs.items()}
        measured = ratio(times["DPO+MLC"], times["DPO"])
        align = alignment_operations(model.config, work.examples)
        mlc = consistency_operations(model.config, work.examples, layer_of(work))
        counted = (align + mlc) / align
        place = f"layer {layer_of(work)} of {model.config.num_hidden_layers}, mlc_parts {passes}"
        table.append([
            place, seconds(times["DPO"]), seconds(times["DPO+MLC"]),
            spread(measured), f"{counted:.2f}", f"{100 * (measured['median'] / counted - 1):+.0f} %",
            gigabytes(memory["DPO"]["peak"]), gigabytes(memory["DPO+MLC"]["peak"]),
        ])  # fmt: skip
        del model, work, jobs
    columns = ["MLC on", "DPO, s", "DPO+MLC, s", "ratio", "counted", "above it", "DPO, GB", "DPO+MLC, GB"]
    return {"columns": columns, "rows": table, "goal": "ratio within 15 % of the counted one"}


# --- 2 ---


def official(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Our DPO+MLC step against one laid out as in the official code."""
    model = make_model(shape, device)
    work = Workload.make(model, make_examples(rows, model.config.vocab_size))
    reference_model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        ours, theirs = work.loss(uses_mlc=True).item(), official_loss(work, reference_model).item()
    jobs = {
        "ours": lambda: work.step(work.loss(uses_mlc=True)),
        "official layout": lambda: work.step(official_loss(work, reference_model)),
    }
    times = alternate(jobs, repeats, device)
    memory = {"official layout": peak_memory(jobs["official layout"], device)}
    parameters = sum(p.numel() for p in model.parameters())
    reference_model = None  # ours has none
    gc.collect()
    memory["ours"] = peak_memory(jobs["ours"], device)
    faster = ratio(times["official layout"], times["ours"])
    table = [
        [name, seconds(times[name]), gigabytes(memory[name]["peak"]), gigabytes(memory[name]["added"])] for name in jobs
    ]
    ratios = [spread(faster)] + [
        share(memory["official layout"][key], memory["ours"][key]) for key in ("peak", "added")
    ]
    table.append(["official / ours", *ratios])
    note = f"{parameters / 1e6:.0f} million parameters, vocabulary {model.config.vocab_size:,}; {rows} rows. "
    note += (
        f"The losses of the first step differ by {abs(ours - theirs):.0e}. Peak holds weights, gradients and moments."
    )
    columns = ["", "seconds a step", "peak, GB", "of it for the step, GB"]
    return {"columns": columns, "rows": table, "note": note, "goal": "at least 3 times as fast, a third of the memory"}


# --- 4 ---


def growth(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Seconds and memory of the MLC pass alone, forward and backward, as one thing grows and the rest stays."""
    standard = dict(languages=8, prompt=32, rows=rows, vocabulary=50_000, layer=None)
    ranges = {
        "languages": (2, 4, 8, 16, 32), "prompt": (16, 32, 64, 128), "rows": (1, 2, 4, 8, 16),
        "vocabulary": (10_000, 50_000, 150_000), "layer": None,
    }  # fmt: skip
    layers = make_config(shape).num_hidden_layers
    table, curves = [], {}
    for name, values in ranges.items():
        values = values or tuple(sorted({max(1, layers * k // 4) for k in range(1, 5)}))
        jobs, model = {}, None
        for value in values:
            size = standard | {name: value}
            if model is None or name == "vocabulary":
                model = make_model(shape, device, size["vocabulary"])
            examples = make_examples(size["rows"], size["vocabulary"], size["languages"], size["prompt"], vary=False)
            jobs[str(value)] = mlc_pass(model, examples, size["layer"] or layers)
        times = alternate(jobs, repeats, device)
        memory = {key: peak_memory(job, device)["added"] for key, job in jobs.items()}
        points = {key: median(times[key]) for key in jobs}
        curves[name] = {"values": list(values), "seconds": list(points.values()), "added_gb": list(memory.values())}
        first, last = str(values[0]), str(values[-1])
        expected = 1.0 if name == "vocabulary" else values[-1] / values[0]
        table.append([
            f"{name}: {first} to {last}", f"{points[first]:.3g} to {points[last]:.3g}",
            spread(ratio(times[last], times[first])), f"{expected:.0f}",
            f"{gigabytes(memory[first])} to {gigabytes(memory[last])}",
        ])  # fmt: skip
    columns = ["what grows", "seconds", "ratio", "if proportional", "added GB"]
    note = (
        "The others stay at: "
        + ", ".join(f"{name} {value}" for name, value in standard.items() if value)
        + ", all layers."
    )
    return {
        "columns": columns,
        "rows": table,
        "note": note,
        "curves": curves,
        "goal": "linear, and flat in the vocabulary",
    }


def mlc_pass(model, examples, layer: int) -> Callable[[], None]:
    work = Workload.make(model, examples[:1], layer)

    def job():
        consistency_loss(model, work.extractor, examples, work.config).backward()
        for parameter in (*model.parameters(), *work.extractor.parameters()):
            parameter.grad = None

    return job


# --- 5 ---


def sigma_by_svd_in_float64(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(unit_rows(x).double())


def sigma_by_gram(x: torch.Tensor) -> torch.Tensor:
    z = unit_rows(x)
    return torch.linalg.eigvalsh(z @ z.mT).clamp(min=0).sqrt().flip(-1)


def sigma_by_gram_in_float64(x: torch.Tensor) -> torch.Tensor:
    return sigma_by_gram(x.double())


def sigma_on_the_cpu(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(unit_rows(x).cpu()).to(x.device)


WAYS = {
    "svdvals, float32 (ours)": singular_values,
    "svdvals, float64": sigma_by_svd_in_float64,
    "Gram matrix, float32": sigma_by_gram,
    "Gram matrix, float64": sigma_by_gram_in_float64,
}


def loss_by(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    sigma = sigma_of(x)
    return -torch.log_softmax(sigma / sigma[:, :1].detach() / 0.2, -1)[:, 0].mean().float()


def gradient_of(sigma_of: Callable, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    loss_by(sigma_of, x).backward()
    return x.grad


def loss_alone(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Forward and backward of the loss, by ways to the singular values; and how right their gradients are."""
    ways = dict(WAYS) | ({"svdvals on the CPU": sigma_on_the_cpu} if device.type == "cuda" else {})
    sizes = [(1, 10, 512), (16, 10, 512), (256, 10, 512), (16, 2, 512), (16, 32, 512), (16, 10, 64), (16, 10, 1024)]
    table = []
    times_of: dict[str, list[str]] = {name: [] for name in ways}
    for n, m, d in sizes:
        x = torch.randn(n, m, d, generator=torch.Generator().manual_seed(0)).to(device)
        few = max(1, 64 // n)  # a job of some milliseconds
        jobs = {name: lambda s=s, x=x, few=few: [gradient_of(s, x) for _ in range(few)] for name, s in ways.items()}
        times = alternate(jobs, max(7, repeats), device)
        for name in ways:
            times_of[name].append(f"{1000 * median(times[name]) / few:.2f}")
    line, noise = (torch.randn(1, k, 512, generator=torch.Generator().manual_seed(k)).to(device) for k in (1, 10))
    for name, sigma_of in ways.items():
        errors = []
        for width in (1.0, 1e-2, 1e-4, 0.0):
            x = line + width * noise
            exact = gradient_of(singular_values, x.double())
            got = gradient_of(sigma_of, x).double()
            if not torch.isfinite(got).all():
                errors.append("NaN")
            elif width == 0:
                errors.append("finite")
            else:
                errors.append(f"{((got - exact).norm() / exact.norm()).item():.0e}")
        table.append([name, *times_of[name], *errors])
    columns = ["milliseconds by (N, m, d)", *(f"{n}, {m}, {d}" for n, m, d in sizes)]
    columns += [f"gradient's error at spread {width}" for width in ("1", "0.01", "0.0001", "0")]
    assert (
        mlc_loss(line + noise).item() == loss_by(singular_values, line + noise).item()
    )  # the first row is the package's
    return {"columns": columns, "rows": table, "goal": "the fastest that loses no accuracy"}


# --- 6 ---


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
    replies = ours(prompts, 256)
    tokens = [len(tokenizer.encode(r["reply"], add_special_tokens=False)) + r["ended"] for r in replies]
    rates = {
        name: [(sum(tokens[:60]) if name == "one by one" else sum(tokens)) / t for t in times[name]] for name in jobs
    }
    fastest = rates["ours, batches of 256"]
    table = [[name, f"{median(rates[name]):,.0f}", spread(ratio(fastest, rates[name]))] for name in jobs]
    columns = ["", "tokens a second", "ours / this"]
    note = f"{len(prompts)} prompts, {sum(tokens):,} tokens of replies, end tokens included."
    return {"columns": columns, "rows": table, "note": note}


# --- 7 ---

# Multiplications and additions a second in dense bfloat16, in float32 for none of them, as published by the maker.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def utilisation(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """A training step beside the plain forward and backward pass of the model on the same tokens, as the ceiling."""
    shapes = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b") if device.type == "cuda" else (shape,)
    peak = next(
        (value for name, value in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None
    )
    table = []
    for name in shapes:
        lean = name == "qwen2.5-7b"  # 16 bytes a parameter would not fit: plain gradients, no optimizer
        model = make_model(name, device, dtype=torch.bfloat16 if lean else torch.float32)
        work = Workload.make(model, make_examples(rows, model.config.vocab_size))
        prompts = [e.prompt for e in work.examples]
        sequences = [p + e.chosen for p, e in zip(prompts, work.examples, strict=True)]
        sequences += [p + e.rejected for p, e in zip(prompts, work.examples, strict=True)]
        batch = {key: value.to(device) for key, value in pad(sequences).items()}
        translations = consistency_batch(work.examples, work.config.language_list)

        def finish(loss, work=work, lean=lean):
            if not lean:
                return work.step(loss)
            loss.backward()
            work.optimizer.zero_grad(set_to_none=True)

        def autocast():
            return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

        def training(work=work, finish=finish):
            with autocast():
                loss = work.loss(uses_mlc=True)
            finish(loss)

        def plain(model=model, batch=batch, translations=translations):
            # What no trainer can do without: the layers' forward and backward passes, padding included.
            with autocast():
                states = model.get_decoder()(**batch, use_cache=False).last_hidden_state
                ids, mask = translations["input_ids"].to(device), translations["attention_mask"].to(device)
                loss = states.float().square().mean() + last_token_states(model, ids, mask).float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)

        times = alternate({"training": training, "plain": plain}, repeats, device)
        tokens = sum(token_count(e, "dpo", True) for e in work.examples)
        needed = alignment_operations(model.config, work.examples)
        needed += consistency_operations(model.config, work.examples, model.config.num_hidden_layers)
        bare = needed - 3 * forward_operations(
            model.config, [], 0, sum(len(e.chosen) + len(e.rejected) for e in work.examples)
        )
        row = [name + ", no optimizer" * lean, f"{tokens / median(times['training']):,.0f}"]
        for key, operations in (("training", needed), ("plain", bare)):
            rate = operations / median(times[key])
            row.append(f"{rate / 1e12:.2g}" + (f" ({100 * rate / peak:.0f} %)" if peak else ""))
        table.append([*row, spread(ratio(times["training"], times["plain"]))])
        del model, work, batch, finish, training, plain
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    columns = [
        "DPO+MLC",
        "tokens a second",
        "needed Tflop/s (of the peak)",
        "layers alone, Tflop/s",
        "step / layers alone",
    ]
    return {
        "columns": columns,
        "rows": table,
        "note": "Layers alone: forward and backward of the same padded batches, no head, no loss, no optimizer.",
    }
