"""The MLC loss in TRL's own trainers, for runs that outgrow one GPU: `python -m mlc_min.ports.trl --help`.

Rows, token ids and the consistency loss are those of `mlc_min.train`; all else is TRL's.
"""

import functools
import math
import warnings
from dataclasses import asdict, field, make_dataclass

import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from mlc_min.consistency import make_extractor
from mlc_min.evaluation.diagnose import probe_figures
from mlc_min.examples import Example, shuffle_translations
from mlc_min.loop import consistency_loss
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.machinery.models import load_model
from mlc_min.machinery.settings import FIELDS, TrainConfig
from mlc_min.train import fitting_examples, select_rows

try:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl import __version__ as trl_version
except ImportError:  # the module can be imported all the same; its command says in one line what is missing
    DPOTrainer = SFTTrainer = object

CHECKED_WITH = "1.16"  # private methods of TRL's trainers are overridden here, and those may change
NAMES = """method model train languages missing too_long harmful_only lora lora_alpha mlc_weight mlc_tau mlc_form
mlc_layer mlc_parts mlc_every consistency separate_weight extractor extractor_dim shuffle_translations""".split()
MLCConfig = make_dataclass(  # TrainConfig's; its parser knows no bounds, so `check` looks at them
    "MLCConfig",
    [(name, FIELDS[name].type, field(default=FIELDS[name].default, metadata={"help": FIELDS[name].metadata["help"]}))
     for name in NAMES],
)  # fmt: skip
# Logged as in mlc_min.train; `retrieval` and `mlc_shuffled` where a process has two rows or more in a forward pass.
FIGURES = ("mlc_loss", "mlc_floor", "mlc_ceiling", "mlc_shuffled", "collinearity", "retrieval")


def token_dataset(examples: list[Example], mlc, seed: int = 0):
    """What the trainers take, from `encode_rows`: the columns of TRL's collators, for DPO and for SFT, and the prompts
    of all languages. It lies in files, where all processes find the reference log-probs that one of them adds."""
    translated = shuffle_translations(examples, seed) if mlc.shuffle_translations else examples
    rows = []
    for example, other in zip(examples, translated, strict=True):
        prompt, chosen = example.prompt, example.chosen
        dpo = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": example.rejected or []}
        sft = {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
        rows.append(dpo | sft | {"languages": list(other.prompts), "translations": list(other.prompts.values())})
    return Dataset.from_generator(lambda: rows)


def refuse(args) -> None:
    """Raise InputError for an option of TRL's with which the consistency loss would be another one, or none."""
    parted = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    for refused, message in (
        # The Trainer would use DataParallel, whose copies would all call the first one's layers and extractor.
        (args.n_gpu > 1, f"{args.n_gpu} GPUs are visible; start it with `accelerate launch --config_file "
         f"mlc_min/ports/ddp.yaml --num_processes {args.n_gpu} -m mlc_min.ports.trl`, or set CUDA_VISIBLE_DEVICES=0"),
        (getattr(args, "packing", False), "--packing true: would part prompts from their translations; leave it out"),
        (parted, "--gradient_checkpointing_kwargs: use_reentrant would part states from their gradient; leave it out"),
        (args.use_liger_kernel, "--use_liger_kernel true: replaces the layers that the states come from; leave it out"),
    ):  # fmt: skip
        if refused:
            raise InputError(message)


class MLCTrainer:
    """λ times the consistency loss beside one of TRL's trainers. mlc: MLCConfig; datasets: of `token_dataset`."""

    def __init__(self, model, args, mlc, train_dataset, **options):
        self.mlc = TrainConfig(**asdict(mlc))
        self.mlc.check()
        self._figures: list[torch.Tensor] = []  # (len(FIGURES),) a micro-batch, of the step that is under way
        refuse(args)
        if not trl_version.startswith(f"{CHECKED_WITH}."):
            message = f"trl {trl_version}: checked with {CHECKED_WITH} only; `python -m pytest tests/test_trl.py` tells"
            warnings.warn(message, stacklevel=3)
        args.remove_unused_columns = False  # or the translations would be
        args.ddp_find_unused_parameters = mlc.mlc_every > 1 or args.ddp_find_unused_parameters  # the extractor's
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)
        if mlc.mlc_weight:  # now that TRL has frozen what it does not train and scored the reference
            self._attach_extractor(self.model, self.data_collator)

    def _attach_extractor(self, model, collator) -> None:
        """Make the extractor part of the model, and its loss part of what `model(…, translations=…)` returns: one call
        of the whole model for both losses, because DDP and FSDP set up gradients and gather weights around that."""
        forward, size = model.forward, model.config.get_text_config().hidden_size
        torch.manual_seed(self.args.seed)
        model.mlc_extractor = make_extractor(self.mlc.extractor, size, self.mlc.extractor_dim).to(self.args.device)

        def collate(rows: list[dict]) -> dict:
            prompts = [dict(zip(row["languages"], row["translations"], strict=True)) for row in rows]
            return collator(rows) | {"translations": [Example("", group, [], None) for group in prompts]}

        @functools.wraps(forward)
        def forward_both(*inputs, translations: list[Example] | None = None, **named_inputs):
            outputs = forward(*inputs, **named_inputs)
            if translations is None:
                return outputs
            batch = model, model.mlc_extractor, translations, self.mlc
            try:
                figures = probe_figures(*batch) if self._figures_are_shown() else {}
                return outputs, consistency_loss(*batch), figures
            except ValueError as error:  # no such layer, or states that are not finite
                raise InputError(f"step {self.state.global_step}: no consistency loss ({error})") from None

        self.data_collator, model.forward = collate, forward_both

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, and λ times the consistency loss in the steps that have it, and in evaluation."""
        mode, found = "train" if self.model.training else "eval", {}
        translations = inputs.pop("translations", None)
        if translations is None or (mode == "train" and self.state.global_step % self.mlc.mlc_every):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def policy(**batch):  # TRL calls this in the model's place: so both losses come out of one forward pass
            outputs, found["loss"], found["figures"] = model(**batch, translations=translations)
            return outputs

        result = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps  # None: TRL will divide
        loss = loss + self.mlc.mlc_weight * found["loss"] / parts
        if found["figures"]:
            self._figures.append(loss.new_tensor([found["figures"].get(name, torch.nan) for name in FIGURES]))
            if mode == "eval" or self.accelerator.sync_gradients:  # the step's last micro-batch
                self._show_figures(mode)
        return (loss, *outputs) if return_outputs else loss

    def _figures_are_shown(self) -> bool:
        """Whether a line of the log comes before the next step with MLC. (The Trainer decides on a line after its step,
        so its rule stands here again.) Figures cost singular values and a wait for all processes: not on every step."""
        if not self.model.training:
            return True
        state, first = self.state, self.args.logging_first_step
        steps = range(state.global_step + 1, state.global_step + 1 + self.mlc.mlc_every)
        return any(n % state.logging_steps == 0 or n == state.max_steps or (first and n == 1) for n in steps)

    def _show_figures(self, mode: str) -> None:
        """Hand TRL's log the means over the step's micro-batches and all processes, gathered at once."""
        means = self.accelerator.gather(torch.stack(self._figures)).nanmean(0).tolist()
        self._figures.clear()
        for name, value in zip(FIGURES, means, strict=True):
            if not math.isnan(value):
                self._metrics[mode][name].append(value)

    def _save(self, output_dir=None, state_dict=None):
        state, prefix = dict(self.model.state_dict() if state_dict is None else state_dict), "mlc_extractor."
        extractor = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        super()._save(output_dir, state)  # the model as every other tool knows it
        if self.args.should_save and extractor:
            settings = {name: str(getattr(self.mlc, name)) for name in NAMES}
            save_file(extractor, f"{output_dir or self.args.output_dir}/extractor.safetensors", settings)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.mlc.mlc_weight and self.mlc.extractor != "identity" and not self.is_fsdp_enabled:  # FSDP has it by now
            self.model.mlc_extractor.load_state_dict(load_file(f"{resume_from_checkpoint}/extractor.safetensors"))


class MLCDPOTrainer(MLCTrainer, DPOTrainer):
    """DPO with the MLC loss. Our `sft_weight` is `loss_type=["sigmoid", "sft"], loss_weights=[1, weight]` here."""

    def _prepare_dataset(self, dataset, *settings):
        return dataset  # it has its token ids


class MLCSFTTrainer(MLCTrainer, SFTTrainer):
    """SFT with the MLC loss. Its mean is TRL's, over all tokens of a step; our loop's is over rows."""


def main() -> None:
    if DPOTrainer is object:
        raise InputError("TRL is not installed; run `pip install -r requirements-trl.txt`")
    parser = functools.partial(HfArgumentParser, prog="python -m mlc_min.ports.trl", allow_abbrev=False)
    method = parser(MLCConfig, add_help=False).parse_known_args()[0].method
    if method not in ("dpo", "sft"):
        raise InputError(f"--method {method}: choose dpo or sft; the others are in mlc_min.train")
    kind, settings = (MLCDPOTrainer, DPOConfig) if method == "dpo" else (MLCSFTTrainer, SFTConfig)
    try:
        mlc, args = parser((MLCConfig, settings)).parse_args_into_dataclasses()
    except ValueError as error:
        raise InputError(f"settings: {error}") from None
    refuse(args)  # before the model is read
    config = TrainConfig(**asdict(mlc), max_length=args.max_length)
    rows, counts = select_rows(config)
    model, tokenizer = load_model(mlc.model)
    dataset = token_dataset(fitting_examples(config, rows, tokenizer, counts), mlc, args.seed)
    alpha = mlc.lora_alpha or 2 * mlc.lora
    lora = LoraConfig(r=mlc.lora, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = kind(model, args, mlc, dataset, processing_class=tokenizer, peft_config=lora if mlc.lora else None)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    run_command(main)
