"""The baseline: a training step laid out as the official code lays it out, written here from its description.

Chosen, rejected and all translated prompts of a batch are one batch, padded to the longest of them. At every step it
goes through the policy and through the reference model, and both build float32 logits over the whole vocabulary
for every position of every row. The losses are the same.
"""

import torch

from mlc_min.consistency import mlc_loss
from mlc_min.examples import pad
from mlc_min.lab.benchmark.workloads import Workload
from mlc_min.preference import dpo_loss


def official_loss(workload: Workload, reference_model) -> torch.Tensor:
    """The loss of `Workload.loss(uses_mlc=True)`, the official way."""
    model, config, examples = workload.model, workload.config, workload.examples
    n, languages = len(examples), config.language_list
    prompts = [example.prompts[languages[0]] for example in examples]
    chosen = [p + example.chosen for p, example in zip(prompts, examples, strict=True)]
    rejected = [p + example.rejected for p, example in zip(prompts, examples, strict=True)]
    translations = [example.prompts[language] for example in examples for language in languages]
    batch = pad(chosen + rejected + translations)
    input_ids, attention_mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    is_response = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, sequence in enumerate(chosen + rejected):
        is_response[row, len(prompts[row % n]) : len(sequence)] = True

    def run(which):
        output = which(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        logps = torch.log_softmax(output.logits.float()[:, :-1], -1)
        logps = logps.gather(-1, input_ids[:, 1:, None])[..., 0]
        return (logps * is_response[:, 1:]).sum(-1)[: 2 * n].chunk(2), output.hidden_states[config.mlc_layer]

    policy_logps, states = run(model)
    with torch.no_grad():
        reference_logps, _ = run(reference_model)
    rows = torch.arange(2 * n, len(input_ids), device=model.device)
    last = attention_mask[2 * n :].sum(-1) - 1
    groups = states[rows, last].view(n, len(languages), -1)
    align = dpo_loss(*policy_logps, *reference_logps, config.beta).mean()
    return align + config.mlc_weight * mlc_loss(workload.extractor(groups), config.mlc_tau, config.mlc_form)
