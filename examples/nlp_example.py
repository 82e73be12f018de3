"""Does sentence B follow sentence A? A sentence-pair classifier, trained on text that every CPython carries.

The loop is that of Accelerate's DeepSpeed guide. One script, any of these:

    zeroaccel launch --cpu --num_processes 2 --zero_stage 2 examples/nlp_example.py
    zeroaccel launch --zero_stage 3 --mixed_precision bf16 examples/nlp_example.py          # every GPU of the machine
    zeroaccel launch --deepspeed_config_file examples/deepspeed_config_templates/zero_stage2_config.json \
        examples/nlp_example.py
    python examples/nlp_example.py                                                # one process, plain PyTorch

The model is a small transformer made here, or with `--model_name_or_path` one of Hugging Face's from a local folder.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zeroaccel import Accelerator
from zeroaccel.utils import DummyOptim, DummyScheduler, set_seed, tqdm

Pair = tuple[str, str, int]  # sentence A, sentence B, 1 if B follows A in the text and 0 if not
Tokenizer = Callable[[list[str], list[str]], dict[str, torch.Tensor]]

SHORTEST_SENTENCE = 6  # words
HELD_OUT = 5  # every fifth topic is for evaluation
DRAWS = 3  # wrong continuations of each sentence in the training set
MAX_GRAD_NORM = 1.0
WARMUP = 0.1  # share of all steps


# --- data -----------------------------------------------------------------------------------------------------------


def split_sentences(text: str) -> list[str]:
    """The prose of a help text: no grammar, no interpreter sessions, no headings."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        prose = " ".join(paragraph.split())
        if ">>>" in prose or "::=" in prose:
            continue
        for sentence in re.split(r'(?<=[.?!:])\s+(?=[A-Z"*])', prose):
            if sentence.endswith((".", "?", "!", ":")) and len(re.findall("[A-Za-z_]+", sentence)) >= SHORTEST_SENTENCE:
                sentences.append(sentence)
    return sentences


def read_neighbours() -> list[list[tuple[str, str]]]:
    """Neighbouring sentences, one list a topic; a sentence that several topics share belongs to the first of them."""
    seen: set[str] = set()
    by_topic = []
    for _, text in sorted(topics.items()):
        sentences = split_sentences(text)
        by_topic.append([(a, b) for a, b in pairwise(sentences) if a not in seen and b not in seen])
        seen.update(sentences)
    return [neighbours for neighbours in by_topic if neighbours]


def make_pairs(by_topic: list[list[tuple[str, str]]], draws: int, seed: int) -> list[Pair]:
    """Each pair of neighbours, and its A with a B of another topic, `draws` times with another B."""
    generator = random.Random(seed)
    pairs: list[Pair] = []
    for topic, neighbours in enumerate(by_topic):
        elsewhere = [b for other, found in enumerate(by_topic) if other != topic for _, b in found]
        for _ in range(draws):
            for a, b in neighbours:
                pairs += [(a, b, 1), (a, generator.choice(elsewhere), 0)]
    generator.shuffle(pairs)
    return pairs


def get_dataloaders(tokenize: Tokenizer, args: argparse.Namespace) -> tuple[DataLoader[Pair], DataLoader[Pair]]:
    """Loaders for training and evaluation, of different topics."""
    by_topic = read_neighbours()
    held_out = by_topic[::HELD_OUT]
    train = make_pairs([topic for index, topic in enumerate(by_topic) if index % HELD_OUT], DRAWS, args.seed)
    evaluation = make_pairs(held_out, 1, args.seed)

    def collate(pairs: list[Pair]) -> dict[str, torch.Tensor]:
        first, second, labels = zip(*pairs, strict=True)
        return {**tokenize(list(first), list(second)), "labels": torch.tensor(labels)}

    def loader(pairs: list[Pair], shuffle: bool) -> DataLoader[Pair]:
        chosen: Any = pairs[: args.max_samples]
        return DataLoader(chosen, batch_size=args.batch_size, shuffle=shuffle, collate_fn=collate)

    return loader(train, shuffle=True), loader(evaluation, shuffle=False)


# --- model ----------------------------------------------------------------------------------------------------------

PAD, START, END, FIRST_WORD = range(4)
VOCABULARY = 4096  # words are hashed into it, so that there is none to build and to carry along
LONGEST_SENTENCE = 30  # words and punctuation marks; the rest is cut off


def hash_words(sentence: str) -> list[int]:
    """One number a word, the same in every process."""
    words = re.findall(r"\w+|[^\w\s]", sentence.lower())[:LONGEST_SENTENCE]
    return [FIRST_WORD + zlib.crc32(word.encode()) % (VOCABULARY - FIRST_WORD) for word in words]


def hashing_tokenizer(first: list[str], second: list[str]) -> dict[str, torch.Tensor]:
    """Pairs as `START A END B END`, padded to the longest: `input_ids`, `token_type_ids`, `attention_mask`."""
    encoded = [(hash_words(a), hash_words(b)) for a, b in zip(first, second, strict=True)]
    length = max(len(a) + len(b) for a, b in encoded) + 3
    ids = torch.full((len(encoded), length), PAD)
    segments = torch.zeros_like(ids)
    for row, (a, b) in enumerate(encoded):
        ids[row, : len(a) + len(b) + 3] = torch.tensor([START, *a, END, *b, END])
        segments[row, len(a) + 2 :] = 1
    return {"input_ids": ids, "token_type_ids": segments, "attention_mask": (ids != PAD).long()}


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward part, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """`hidden`: (batch, length, width); `visible`: (batch, 1, 1, length), False at padding."""
        batch, length, width = hidden.shape
        heads = self.query_key_value(self.attention_norm(hidden)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        mixed = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        return hidden + F.dropout(self.feed_forward(self.feed_forward_norm(hidden)), self.dropout, self.training)


class PairEncoder(nn.Module):
    """A small transformer over both sentences.

    Each word is told whether the other sentence has it too. Without that, so small a text teaches it to know its own
    words by heart, and nothing about words of topics that it never saw.
    """

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.position = nn.Embedding(2 * LONGEST_SENTENCE + 3, width)
        self.segment, self.shared = nn.Embedding(2, width), nn.Embedding(2, width)
        nn.init.normal_(self.word.weight, std=0.02)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Mean cross-entropy `loss` and `logits` (batch, 2)."""
        equal = input_ids[:, :, None] == input_ids[:, None, :]
        apart = token_type_ids[:, :, None] != token_type_ids[:, None, :]
        shared = (equal & apart).any(dim=2) & (input_ids >= FIRST_WORD)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.word(input_ids) + self.position(positions) + self.segment(token_type_ids)
        hidden = hidden + self.shared(shared.long())
        visible = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, visible)
        logits = self.classifier(self.norm(hidden[:, 0]))
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def load_model(name_or_path: str | None) -> tuple[Tokenizer, nn.Module]:
    """The small transformer of this file, or a model and its tokenizer from a folder of Hugging Face's format."""
    if name_or_path is None:
        return hashing_tokenizer, PairEncoder()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)

    def tokenize(first: list[str], second: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(first, second, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    return tokenize, AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=2)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run arrived at.

    Attributes:
        accuracy: share of the held-out pairs that were told right.
        chance: share that the more frequent answer alone would get.
        first_loss, last_loss: means over the first and the last tenth of the training.
    """

    accuracy: float
    chance: float
    first_loss: float
    last_loss: float

    def __str__(self) -> str:
        return (
            f"held-out accuracy {self.accuracy:.1%} (chance {self.chance:.1%}),"
            f" training loss {self.first_loss:.3f} -> {self.last_loss:.3f}"
        )


def get_optimizer_and_scheduler(
    accelerator: Accelerator, model: nn.Module, lr: float, total_steps: int
) -> tuple[Any, Any]:
    """AdamW and a linear schedule, or what stands for them where the DeepSpeed config file describes its own.

    Args:
        accelerator: knows the config.
        model: whose parameters are trained.
        lr: learning rate after the warm-up.
        total_steps: optimizer steps that one process alone would do.
    """
    config = accelerator.deepspeed_config or {}
    warmup_steps = math.ceil(WARMUP * total_steps)
    if "optimizer" in config:
        optimizer = DummyOptim(model.parameters(), lr=lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    if "scheduler" in config:
        return optimizer, DummyScheduler(optimizer, total_num_steps=total_steps, warmup_num_steps=warmup_steps)

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, max(0.0, (total_steps - step) / (total_steps - warmup_steps + 1)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Pair]) -> tuple[float, float]:
    """Accuracy on the held-out pairs, and chance level."""
    model.eval()
    right = positive = total = 0
    for batch in loader:
        with torch.no_grad():
            predictions = model(**batch)["logits"].argmax(dim=-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        right += int((predictions == labels).sum())
        positive += int(labels.sum())
        total += len(labels)
    return right / total, max(positive, total - positive) / total


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """What the command line says; all else comes from the launcher."""
    return Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def training_function(accelerator: Accelerator, args: argparse.Namespace) -> Result:
    """Trains and evaluates on every rank."""
    set_seed(args.seed)
    tokenize, model = load_model(args.model_name_or_path)
    train_loader, eval_loader = get_dataloaders(tokenize, args)
    total_steps = args.num_epochs * math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    optimizer, scheduler = get_optimizer_and_scheduler(accelerator, model, args.lr, total_steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    plugin = accelerator.deepspeed_plugin
    strategy = "plain PyTorch" if plugin is None else f"DeepSpeed ZeRO stage {plugin.zero_stage}"
    accelerator.print(
        f"{accelerator.num_processes} rank(s) on {accelerator.device.type}, {strategy},"
        f" mixed precision {accelerator.mixed_precision};"
        f" {len(train_loader.dataset)} training pairs, {len(eval_loader.dataset)} held out"
    )
    losses = []
    accuracy = chance = 0.0
    for epoch in range(1, args.num_epochs + 1):
        model.train()
        bar = tqdm(train_loader, desc=f"epoch {epoch}/{args.num_epochs}", mininterval=0.5)
        for batch in bar:
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{scheduler.get_last_lr()[0]:.1e}", refresh=False)
        accuracy, chance = evaluate(accelerator, model, eval_loader)
        accelerator.print(f"epoch {epoch}/{args.num_epochs}: held-out accuracy {accuracy:.1%}")
    curve = accelerator.reduce(torch.stack(losses).float(), reduction="mean")
    tenth = max(1, len(curve) // 10)
    result = Result(accuracy, chance, float(curve[:tenth].mean()), float(curve[-tenth:].mean()))
    accelerator.print(f"result: {result}")
    return result


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description="Does sentence B follow sentence A?")
    parser.add_argument("--model_name_or_path", help="folder of a Hugging Face model (default: a small one made here)")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: what the launcher says")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs that each rank takes at a time")
    parser.add_argument("--lr", type=float, default=2e-3, help="2e-5 is usual for pretrained models")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_samples", type=int, help="take only so many pairs, for a quick try (default: all)")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def main() -> None:
    """Runs the script."""
    args = make_parser().parse_args()
    accelerator = make_accelerator(args)
    training_function(accelerator, args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
