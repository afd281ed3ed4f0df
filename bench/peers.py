"""The other side of a bench: transformers and TRL, quiet and offline, in the shape of one of our models."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from model.transformer import ModelConfig


@contextmanager
def installed() -> Iterator[None]:
    """Around the imports of a peer: silent, offline, and one clear line where it is missing."""
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE", "TQDM_DISABLE"), "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[compare]'") from None
    import transformers

    transformers.logging.set_verbosity_error()


def llama_config(model: ModelConfig, **ids: int | None):
    """transformers' config of the same shape; `ids` of its special tokens."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=model.width, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads, intermediate_size=model.ffn, vocab_size=model.vocab_size,
        max_position_embeddings=model.context, tie_word_embeddings=model.tied, num_labels=1, **ids,
    )  # fmt: skip
