"""mlc_min: the Multi-Lingual Consistency loss, small enough to read. See README.md."""

import sys
from importlib import import_module
from importlib.util import find_spec

# Every command imports this file first, so what is not installed is said here, in one line and before any traceback.
# (transformers brings NumPy, PyYAML, safetensors and tqdm.)
for _name in ("torch", "transformers", "matplotlib", "py3langid"):
    if find_spec(_name) is None:
        _message = f"{_name.replace('torch', 'PyTorch')} is not installed; run `pip install -r requirements.txt`"
        if sys.argv[0] == "-m":  # as it reads while Python looks for the module of `python -m mlc_min.train`
            print(f"error: {_message}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(_message)

from mlc_min.consistency import cosine_loss, make_extractor, mlc_ceiling, mlc_floor, mlc_loss, singular_values
from mlc_min.machinery.errors import InputError
from mlc_min.preference import dpo_loss, orpo_loss, sequence_logps, sft_loss, simpo_loss

__all__ = [
    "InputError", "collinearity", "cosine_loss", "dpo_loss", "last_token_states", "make_extractor", "mlc_ceiling",
    "mlc_floor", "mlc_loss", "orpo_loss", "retrieval_accuracy", "safety_table", "sequence_logps", "sft_loss",
    "shuffle_groups", "simpo_loss", "singular_values",
]  # fmt: skip


_LATER = {
    "last_token_states": "mlc_min.states",
    "safety_table": "mlc_min.evaluation.metrics",
    **dict.fromkeys(("collinearity", "retrieval_accuracy", "shuffle_groups"), "mlc_min.evaluation.diagnose"),
}


def __getattr__(name: str):
    # These modules import transformers (seconds), which the pure functions do not need; the modules that
    # are also commands must not be imported here, or `python -m` would run them twice.
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'mlc_min' has no attribute {name!r}")
