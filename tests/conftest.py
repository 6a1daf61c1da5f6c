"""Shared by all tests: a Hypothesis profile without torch-hostile deadlines, and a tiny random model."""

import pytest
import torch
from hypothesis import settings
from transformers import Qwen2Config, Qwen2ForCausalLM

from mlc_min.lab.sentences import EMBEDDED, LANGUAGES
from mlc_min.machinery.models import load_model
from mlc_min.machinery.rows import read_rows

# torch's first call of an operation can take longer than Hypothesis's 200 ms; derandomize keeps CI repeatable.
settings.register_profile("mlc_min", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("mlc_min")


@pytest.fixture(scope="session")
def tiny_model():
    """A random 3-layer Qwen2 with 64 tokens, float32, eval mode: fast, and every value computable another way."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def base():
    """The committed base model and its tokenizer. Tests that train take a deep copy."""
    return load_model(EMBEDDED / "model")


@pytest.fixture(scope="session")
def test_rows():
    """The committed test rows, all twelve languages."""
    return read_rows(EMBEDDED / "test.jsonl", LANGUAGES, ("chosen", "rejected"))
