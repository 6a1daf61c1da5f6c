"""The same step in TRL's DPOTrainer, and in our port to it, each step of theirs followed by one of ours."""

import copy
import gc
import tempfile
import time

import torch
from transformers import AutoTokenizer, TrainerCallback

from mlc_min.lab.benchmark.measure import HighWater, gigabytes, peak_memory, ratio, seconds, share, spread, synchronize
from mlc_min.lab.benchmark.workloads import Workload, make_examples, make_model
from mlc_min.lab.sentences import EMBEDDED


def trl(shape: str, rows: int, repeats: int, device: torch.device) -> dict:
    """Our step against TRL's: plain DPO, and with MLC by `mlc_min/ports/trl.py`."""
    try:
        import trl as package
        from trl import DPOConfig

        from mlc_min.ports.trl import MLCConfig, MLCDPOTrainer, token_dataset
    except ImportError:
        return {"columns": [], "rows": [], "note": "TRL is not installed (`pip install -r requirements-trl.txt`)."}
    table = []
    kinds = ((0.0, True, "DPO"), (0.0, False, "DPO, live reference"), (0.8, True, "DPO+MLC, our port"))
    for weight, precomputed, name in kinds:
        model = make_model(shape, device)
        examples = make_examples(rows, model.config.vocab_size)
        work = Workload.make(copy.deepcopy(model), examples)
        config = MLCConfig(languages=work.config.languages, mlc_weight=weight)
        # on the same data, in the same arithmetic, with the same optimizer; nothing saved, nothing logged
        settings = DPOConfig(
            output_dir=tempfile.mkdtemp(), max_steps=repeats + 2, per_device_train_batch_size=rows, learning_rate=1e-6,
            bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=precomputed, disable_tqdm=True,
            use_cpu=device.type == "cpu", report_to="none", save_strategy="no", logging_steps=10_000, max_grad_norm=1.0,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")
        ours = InTurn(lambda work=work, weight=weight: work.step(work.loss(uses_mlc=weight > 0)), device)
        dataset = token_dataset(examples, config)
        live = {} if precomputed else {"ref_model": copy.deepcopy(model)}
        trainer = MLCDPOTrainer(model, settings, config, dataset, processing_class=tokenizer, callbacks=[ours], **live)
        trainer.train()
        theirs_gb, ours_gb = ours.memory["theirs"], ours.memory["ours"]
        table.append([
            name, seconds(ours.seconds["theirs"]), seconds(ours.seconds["ours"]),
            spread(ratio(ours.seconds["theirs"], ours.seconds["ours"])),
            gigabytes(theirs_gb), gigabytes(ours_gb), share(theirs_gb, ours_gb),
        ])  # fmt: skip
        del trainer, model, work, ours
        gc.collect()
    columns = ["", "TRL, s", "ours, s", "TRL / ours", "TRL, GB for the step", "ours, GB for the step", "TRL / ours"]
    note = f"TRL {package.__version__}. Its reference log-probs are made beforehand but in the second row; ours always."
    return {"columns": columns, "rows": table, "note": note, "goal": "at least as fast, at no more memory"}


class InTurn(TrainerCallback):
    """Times each step of the trainer and then a step of ours; the first two steps are a warm-up and for the memory."""

    def __init__(self, job, device):
        self.job, self.device = job, device
        self.seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        self.memory: dict[str, float | None] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        gc.collect()
        if state.global_step == 1:
            self.mark = HighWater(self.device)
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        elapsed = time.perf_counter() - self.start
        if state.global_step == 2:
            self.memory["theirs"] = self.mark.read()["added"]
            self.memory["ours"] = peak_memory(self.job, self.device)["added"]
        if state.global_step <= 2:
            self.job()
            return
        self.seconds["theirs"].append(elapsed)
        gc.collect()
        start = time.perf_counter()
        self.job()
        synchronize(self.device)
        self.seconds["ours"].append(time.perf_counter() - start)
