"""Demonstrations and preferences that need no download: descriptions of things, and somebody with a hidden taste.

A prompt asks for a thing ("describe the river in winter :"), a description names it and says what it is like ("the
river is calm and deep and old"). The judge's taste is a rule that no model is told: they see demonstrations, which are
indifferent to it, and pairs of descriptions of which the judge took one.

The rule has an end, which the demonstrations never reach: nobody in them says the same twice or goes on for long. A
reward model that learned from such pairs that kind words are good may find any number of them splendid: what PPO then
makes of it is over-optimisation, and can be measured, since the rule is here.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.checks import InputError
from rlhf.lm.generation import TransformersEngine
from rlhf.lm.models import end_token_ids
from rlhf.lm.rewards import Row
from rlhf.lm.tasks import Task, pad_left
from rlhf.run.seeding import draw_seeds, generator_for

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
THINGS = (
    "river", "town", "house", "garden", "road", "forest", "tower", "market", "lake", "field", "bridge", "harbour",
    "island", "village", "valley", "hill",
)  # fmt: skip
SEASONS = ("spring", "summer", "autumn", "winter", "may", "june", "july", "august")
KIND = (
    "calm", "bright", "lovely", "gentle", "merry", "golden", "fresh", "sweet", "warm", "clear", "friendly", "graceful",
)  # fmt: skip
PLAIN = ("old", "long", "wide", "small", "flat", "deep", "round", "brown", "near", "plain", "late", "square")
UNKIND = ("ugly", "dirty", "cruel", "foul", "bitter", "dull", "broken", "nasty", "grim", "rotten", "vile", "bleak")
ADJECTIVES = KIND + PLAIN + UNKIND
ASKING = ("describe", "picture", "praise", "recall")

WRONG_THING = 0.2  # share of demonstrations about something that was not asked for
FEWEST, MOST = 1, 5  # adjectives in a demonstration
ENOUGH = 3  # kind words beyond so many please nobody any more
DECISIVENESS = 2.0  # the judge's log-odds per point of taste
PATIENCE = 6  # adjectives after which the judge tires


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = [PAD, EOS, UNKNOWN, ":", "the", "is", "and", "in", *ASKING, *THINGS, *SEASONS, *ADJECTIVES]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


def build_model(seed: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Two layers of width 64, 136 thousand parameters, random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def prompts(*, held_out: int = 128) -> tuple[list[Row], list[Row]]:
    """All prompts but `held_out`, and those: the same whatever the run's seed."""
    rows = [
        {"prompt": f"{asking} the {thing} in {season} :", "thing": thing}
        for asking, thing, season in product(ASKING, THINGS, SEASONS)
    ]
    order = torch.randperm(len(rows), generator=generator_for(0, "problems")).tolist()
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def task() -> Task:
    """The prompts, with the hidden rule as the verifier: what is reported on held-out prompts and trains nobody."""
    return Task("descriptions", *prompts(), taste, metric="taste")


def demonstrations(rows: Sequence[Row], count: int, *, seed: int) -> list[Row]:
    """`count` rows with "prompt" and "completion": adjectives of every sort, no two alike; some of another thing."""
    generator = generator_for(seed, "demonstrations")
    found = []
    for _ in range(count):
        row = rows[_draw(len(rows), generator)]
        strays = float(torch.rand((), generator=generator)) < WRONG_THING
        thing = THINGS[_draw(len(THINGS), generator)] if strays else row["thing"]
        number = FEWEST + _draw(MOST - FEWEST + 1, generator)
        picked = torch.randperm(len(ADJECTIVES), generator=generator)[:number].tolist()
        words = " and ".join(ADJECTIVES[i] for i in picked)
        found.append({"prompt": row["prompt"], "completion": f"the {thing} is {words}"})
    return found


def taste(prompts: list[str], completions: list[str], thing: list[str], **_: object) -> list[float]:
    """The hidden rule: 1 for naming the thing, 1 for each different kind word up to ENOUGH; -1 for each unkind word,
    each adjective said again, each adjective beyond PATIENCE. At most 4."""
    return [_taste(completion, asked) for completion, asked in zip(completions, thing, strict=True)]


def _taste(completion: str, thing: str) -> float:
    words = completion.split()
    said = [word for word in words if word in ADJECTIVES]
    named = float(next((word for word in words if word in THINGS), None) == thing)
    kind = min(len({word for word in said if word in KIND}), ENOUGH)
    unkind = sum(word in UNKIND for word in said)
    return named + kind - unkind - (len(said) - len(set(said))) - max(len(said) - PATIENCE, 0)


def judged(rows: Sequence[Row], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[Row]:
    """Pairs with "prompt", "chosen" and "rejected": the judge takes the first with probability sigmoid(2 * lead).

    `lead` is the difference in taste: one kind word more wins 88 % of the time. So the labels are noisy, and a reward
    model's probabilities have true ones to be compared with. Pairs of equal taste are left out.

    Args:
        rows: [N] with "prompt" and "thing".
        first, second: [N] completions.
    """
    generator = generator_for(seed, "demonstrations", 1)
    found = []
    for row, a, b in zip(rows, first, second, strict=True):
        lead = _taste(a, row["thing"]) - _taste(b, row["thing"])
        takes_first = float(torch.rand((), generator=generator)) < 1 / (1 + math.exp(-DECISIVENESS * lead))
        if lead != 0:
            chosen, rejected = (a, b) if takes_first else (b, a)
            found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return found


def completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    seed: int,
    max_new_tokens: int = 32,
) -> list[str]:
    """One sampled completion, as text, of each row's prompt."""
    token_ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    ids, mask = pad_left(
        token_ids, width=max(map(len, token_ids)), pad_token_id=tokenizer.pad_token_id, device=model.device
    )
    engine = TransformersEngine(
        model, eos_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    seeds = draw_seeds(len(rows), generator_for(seed, "completions"))
    found = engine.generate(ids, mask, max_new_tokens=max_new_tokens, temperature=1.0, seeds=seeds)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in found.token_ids.tolist()]


def sampled_preferences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, train: int, held_out: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """The judge's verdicts on pairs of the model's own completions: of `train` and `held_out` prompts, drawn with
    repetition from the training and the held-out prompts, less those of equal taste."""
    found = []
    for part, (rows, count) in enumerate(zip(prompts(), (train, held_out), strict=True)):
        asked = [rows[i % len(rows)] for i in range(count)]
        first, second = (completed(model, tokenizer, asked, seed=4 * seed + 2 * part + i) for i in range(2))
        found.append(judged(asked, first, second, seed=2 * seed + part))
    return found[0], found[1]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """The tokenizer is the one made here.

    Raises:
        InputError: it is not, so that its model knows nothing of these prompts.
    """
    if tokenizer.get_vocab() != build_tokenizer().get_vocab():
        raise InputError(
            f"without --data, prompts are made up for the small model of recipes/sft.py, but {source!r} is another: "
            "pass --data <file, folder or hub id>"
        )


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
