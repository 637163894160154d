"""The model that needs no download: a small Llama and its tokenizer, made in code and taught arithmetic imperfectly."""

from itertools import zip_longest

import torch
from accelerate import PartialState
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.lm.experience import Sequences
from rlhf.lm.rewards import Row
from rlhf.lm.sft import fine_tune
from rlhf.lm.tasks import Task, pad_left
from rlhf.run import LiveView
from rlhf.run.seeding import generator_for

PAD, EOS = "<pad>", "<eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: digits, "+" and "=", and the two special tokens."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, "?", "+", "=", *"0123456789"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token="?", padding_side="left"
    )


def build_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Two layers of width 64, 132 thousand parameters, random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,  # at this width the usual 0.02 keeps attention flat for hundreds of steps
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def build_taught_model(
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    forget_carry: float = 0.6,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> LlamaForCausalLM:
    """The small model after supervised fine-tuning on demonstrations by somebody who often forgets to carry.

    The pupil then mostly forgets too (greedy answers are wrong wherever there is a carry), but now and then does not:
    what reinforcement learning needs to start from.

    Args:
        forget_carry: probability that a carry is dropped, each independently.
    """

    def demonstrations(step: int) -> Sequences:
        generator = generator_for(seed, "demonstrations", step)
        chosen = torch.randint(len(task.train), (batch_size,), generator=generator).tolist()
        forgotten = (torch.rand(batch_size, 8, generator=generator) < forget_carry).tolist()
        rows = [
            {"prompt": task.train[i]["prompt"], "answer": sum_forgetting_carries(task.train[i]["prompt"], forgets)}
            for i, forgets in zip(chosen, forgotten, strict=True)
        ]
        return encode_demonstrations(rows, tokenizer)

    model = build_model(seed, tokenizer).to(PartialState().device)
    with LiveView("supervised", steps, columns=("loss",), enabled=PartialState().is_main_process) as view:
        fine_tune(
            model,
            demonstrations,
            steps=steps,
            learning_rate=learning_rate,
            on_step=lambda step, loss: view.update(step, {"loss": loss}),
        )
    return model


def sum_forgetting_carries(prompt: str, forgets: list[bool]) -> str:
    """The reversed sum for a prompt "107+95=", where the carry out of digit i is dropped if forgets[i]."""
    a, b = (number[::-1] for number in prompt.rstrip("=").split("+"))
    digits, carry = [], 0
    for i, (x, y) in enumerate(zip_longest(a, b, fillvalue="0")):
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        digits.append(str(digit))
        carry = 0 if forgets[i] else carry
    return "".join(digits) + ("1" if carry else "")


def encode_demonstrations(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Prompt, answer and end-of-sequence token; the answer's tokens and the end are the ones to learn."""
    prompts = tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
    answers = tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
    ids, mask = pad_left(prompts, width=max(map(len, prompts)), pad_token_id=tokenizer.pad_token_id)
    length = max(map(len, answers))
    completions = torch.tensor([[*a, *[tokenizer.pad_token_id] * (length - len(a))] for a in answers])
    action_mask = torch.tensor([[True] * len(a) + [False] * (length - len(a)) for a in answers])
    return Sequences(torch.cat([ids, completions], -1), torch.cat([mask, action_mask], -1), action_mask)
