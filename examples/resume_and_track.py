"""The sentence pairs of `nlp_example.py`, trained so that an interruption loses nothing, with its curves.

    zeroaccel launch --cpu --num_processes 2 --zero_stage 2 examples/resume_and_track.py --project_dir runs
    tensorboard --logdir runs

End it by SIGTERM, as SLURM and spot machines do, or with `kill -9` at whatever instant. The same command goes on: after
SIGTERM with the very next step, else after the last checkpoint; with another `--num_processes` or `--zero_stage`, too.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import nlp_example
from torch.utils.data import DataLoader

from zeroaccel import Accelerator, DataLoaderConfiguration
from zeroaccel.checkpoint import PREEMPTED
from zeroaccel.utils import ProjectConfiguration, set_seed


class Progress:
    """How far the training is; checkpoints keep it.

    Attributes:
        epoch: the running one, from 0.
        step: steps done, of all epochs.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def save_and_leave(accelerator: Accelerator) -> None:
    """The machine is needed elsewhere: the exit status says "start me again"."""
    accelerator.save_state()
    accelerator.end_training()
    sys.exit(PREEMPTED)


def train_epoch(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, loader: DataLoader[Any], progress: Progress
) -> None:
    """What is left of the running epoch."""
    model.train()
    for batch in loader:
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), nlp_example.MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        accelerator.log({"loss": loss, "learning rate": scheduler.get_last_lr()[0]}, step=progress.step)
        if accelerator.should_checkpoint():
            save_and_leave(accelerator)


def training_function(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Trains what is left to train, and evaluates after each epoch."""
    set_seed(args.seed)
    tokenize, model = nlp_example.load_model(args.model_name_or_path)
    train_loader, eval_loader = nlp_example.get_dataloaders(tokenize, args)
    total_steps = args.num_epochs * math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    optimizer, scheduler = nlp_example.get_optimizer_and_scheduler(accelerator, model, args.lr, total_steps)
    model, optimizer, train_loader, eval_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, scheduler
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if accelerator.newest_checkpoint() is not None:
        accelerator.load_state()
        accelerator.print(f"going on in epoch {progress.epoch + 1} after step {progress.step}")
    # What a killed run had drawn after its last checkpoint is drawn again.
    purge = {"tensorboard": {"purge_step": progress.step + 1}}
    accelerator.init_trackers("sentence_pairs", vars(args), init_kwargs=purge)
    while progress.epoch < args.num_epochs:
        train_epoch(accelerator, model, optimizer, scheduler, train_loader, progress)
        accuracy, _ = nlp_example.evaluate(accelerator, model, eval_loader)
        accelerator.log({"held-out accuracy": accuracy}, step=progress.step)
        accelerator.print(f"epoch {progress.epoch + 1}/{args.num_epochs}: held-out accuracy {accuracy:.1%}")
        progress.epoch += 1
        accelerator.save_state()
    accelerator.print(f"done after step {progress.step}")


def main() -> None:
    """Runs the script."""
    parser = nlp_example.make_parser()
    parser.add_argument("--project_dir", default="runs", help="folder of checkpoints and curves")
    args = parser.parse_args()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(args.project_dir, automatic_checkpoint_naming=True, total_limit=2),
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True),
    )
    training_function(accelerator, args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
