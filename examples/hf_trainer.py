"""transformers.Trainer with AttBalance: gradient accumulation, bf16, and a teacher that is saved and restored.

    python examples/hf_trainer.py                 # writes runs/hf_trainer
    python examples/hf_trainer.py --stop-after 2  # stops early, as if killed ...
    python examples/hf_trainer.py --resume        # ... and goes on, with the teacher as it was

Lines that end in `# +` are what AttBalance adds to plain training. Needs `pip install transformers accelerate`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from attbalance_ext import AttBalanceLoss, AttentionTap, BoxRegion, MomentumTeacher, attention_terms  # +


def make_tap(model: nn.Module) -> AttentionTap:  # +
    return AttentionTap([layer.self_attn for layer in model.encoder.layers[-4:]], query=0, visual=slice(2, 66))  # +


class GroundingTrainer(Trainer):
    def __init__(self, *args, terms_epochs: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.terms_epochs = terms_epochs  # +
        self.criterion = AttBalanceLoss()  # + in place of L1 + GIoU
        self.tap = make_tap(self.model)  # +
        self.teacher = MomentumTeacher(self.model, make_tap)  # +
        self.add_callback(TeacherCallback(self.teacher))  # +

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pictures, words, boxes = inputs["pictures"], inputs["words"], inputs["boxes"]
        with self.tap.recording():  # +
            predicted = model(pictures, words)
        terms = None  # + the plain box loss, in the last third
        if self.state.epoch < self.terms_epochs:  # +
            with self.accelerator.autocast():  # +
                seen = self.teacher.attention(pictures, words)  # +
            terms = attention_terms(self.tap.attention(), BoxRegion(boxes, (8, 8)), teacher=seen)  # +
        loss = self.criterion(terms, predicted, boxes).loss
        return (loss, {"predicted": predicted}) if return_outputs else loss


class TeacherCallback(TrainerCallback):  # +
    def __init__(self, teacher: MomentumTeacher) -> None:  # +
        self.teacher = teacher  # +

    def on_step_begin(self, args, state, control, model=None, **kwargs):  # + once per optimizer step
        self.teacher.update(model)  # +

    def on_save(self, args, state, control, **kwargs):  # +
        if state.is_world_process_zero:  # +
            torch.save(self.teacher.state_dict(), self.file(args, state))  # +

    def on_train_begin(self, args, state, control, **kwargs):  # +
        if state.global_step > 0:  # + resumed from a checkpoint
            self.teacher.load_state_dict(torch.load(self.file(args, state), map_location="cpu", weights_only=True))  # +

    def file(self, args: TrainingArguments, state) -> Path:  # +
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "teacher.pt"  # +


class StopAfter(TrainerCallback):
    """Ends the training after some epochs, as a killed job would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch >= self.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="the terms are on for the first two thirds")
    parser.add_argument("--stop-after", type=int, help="epochs after which to stop")
    parser.add_argument("--batches", type=int, default=50, help="batches an epoch; two of them make a step")
    parser.add_argument("--out", default="runs/hf_trainer")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Grounder()
    report("before", model)
    data = zip(*scenes(16 * args.batches, seed=0), strict=True)
    trainer = GroundingTrainer(
        model,
        TrainingArguments(
            args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            bf16=True,
            max_grad_norm=10.0,  # the terms' gradients are larger than the box loss's: a clip at 1 would shrink that
            use_cpu=not torch.cuda.is_available(),
            save_strategy="epoch",
            remove_unused_columns=False,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"pictures": picture, "words": word, "boxes": box} for picture, word, box in data],
        callbacks=[StopAfter(args.stop_after or args.epochs)],
        terms_epochs=2 * args.epochs // 3,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    report("after", model)


COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)


class Grounder(nn.Module):
    """Patches, a word and REG through one encoder."""

    def __init__(self, dim: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(5, dim, patch, stride=patch)
        self.words = nn.Embedding(len(COLOURS), dim)
        self.reg = nn.Parameter(torch.randn(1, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, pictures: Tensor, words: Tensor) -> Tensor:
        """pictures (B, 5, 32, 32), words (B,) -> boxes (B, 4), cxcywh in [0, 1]."""
        visual = self.patches(pictures).flatten(2).transpose(1, 2)
        reg = self.reg.expand(len(pictures), 1, -1)
        tokens = torch.cat([reg, self.words(words)[:, None], visual], dim=1)
        return self.head(self.encoder(tokens)[:, 0]).sigmoid()


def scenes(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 5, size, size): red, green, blue, x, y; the colour asked for (B,); its box (B, 4)."""
    generator = torch.Generator().manual_seed(seed)
    pixel = (torch.arange(size) + 0.5) / size
    pictures = 0.2 * torch.rand(count, 3, size, size, generator=generator)
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(1)
    for drawn in range(4):
        extent = 0.2 + 0.3 * torch.rand(count, 2, generator=generator)
        centre = extent / 2 + torch.rand(count, 2, generator=generator) * (1 - extent)
        across, down = ((pixel - centre[..., None]).abs() < extent[..., None] / 2).unbind(1)
        inside = (down[:, :, None] & across[:, None, :])[:, None]
        pictures = torch.where(inside, COLOURS[colours[:, drawn], :, None, None], pictures)
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    places = torch.stack([x, y]).expand(count, -1, -1, -1)
    return torch.cat([pictures, places], dim=1), colours[:, 3], torch.cat([centre, extent], dim=1)


@torch.no_grad()
def report(name: str, model: Grounder) -> None:
    """The box loss, accuracy at IoU 0.5 and attention in the box (last layer) on 200 pictures not trained on."""
    pictures, words, boxes = scenes(200, seed=10**6)
    model.cpu().eval()
    tap = make_tap(model)
    with tap.recording():
        predicted = model(pictures, words)
    in_box = attention_terms(tap.attention(), BoxRegion(boxes, (8, 8))).in_box[-1].mean()
    tap.remove()
    model.train()
    output = AttBalanceLoss()(None, predicted, boxes)
    accuracy = (output.iou >= 0.5).float().mean()
    print(f"{name:<7} loss {output.loss:.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}")


if __name__ == "__main__":
    main()
