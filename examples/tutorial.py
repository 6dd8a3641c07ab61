# %% [markdown]
# # AttBalance, step by step
#
# In visual grounding a transformer gets a picture and a sentence and must return the box that the sentence
# describes. An *object query* (a REG token, a decoder query) collects what the box head needs, by attending to the
# visual tokens. Plain training says nothing about where it should attend. AttBalance (arXiv 2407.03243) does.
#
# This file is a script (`python examples/tutorial.py`, seconds on a CPU) and a notebook: editors that know
# percent cells, or jupytext, open it as one. Pictures go to `runs/tutorial`.

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from attbalance_ext import (
    AttBalanceConfig,
    AttBalanceLoss,
    AttentionTap,
    BoxRegion,
    MomentumTeacher,
    QueryAttention,
    attention_map,
    attention_terms,
)

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--out", type=Path, default=Path("runs/tutorial"))
options, _ = parser.parse_known_args()  # a notebook has arguments of its own
options.out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## A task
#
# Four boxes of different colours, and a word that names one of the colours. Two of the five channels say where a
# pixel is.

# %%
COLOURS = torch.tensor(
    [[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.8, 0.2, 0.8], [0.1, 0.8, 0.8]]
)


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


# %% [markdown]
# ## A model
#
# Six encoder layers read [REG, the word, 8 x 8 visual tokens]. REG's output gives the box.


# %%
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


model = Grounder()

# %% [markdown]
# ## What is supervised
#
# In layer $l$ let $q$ be the object query and $k_j$ the key of visual token $j$. The scores before softmax are
# averaged over the $H$ heads of width $d$, and $p$ is their softmax over the visual tokens alone:
#
# $$s_j = \frac{1}{H} \sum_h \frac{q_h \cdot k_{jh}}{\sqrt d}, \qquad p_j = \frac{e^{s_j}}{\sum_i e^{s_i}}.$$
#
# This is not the attention that the network uses itself, which is one softmax a head and goes over words, too.
#
# An `AttentionTap` reads $q$ and $k_j$ out of the model's own layers while it runs. The model is not changed and
# keeps its fused attention. `query=0` is REG's place among the tokens, `visual` the places of the visual tokens.


# %%
def make_tap(model: nn.Module) -> AttentionTap:
    return AttentionTap([layer.self_attn for layer in model.encoder.layers[-4:]], query=0, visual=slice(2, 66))


tap = make_tap(model)
pictures, words, boxes = scenes(200, seed=10**6)  # never trained on


def look(model: nn.Module) -> tuple[Tensor, QueryAttention]:
    """The predicted boxes (B, 4) and the object query's attention in the four tapped layers."""
    model.eval()
    with torch.no_grad(), tap.recording():
        predicted = model(pictures, words)
    model.train()
    return predicted, tap.attention()


predicted_before, attention_before = look(model)
map_before = attention_map(attention_before)  # p: (L, B, N)

# %% [markdown]
# ## RAC: attention belongs into the box
#
# The true box on the token grid is a mask $m_j \in [0, 1]$. The attention inside and outside of it, and the loss:
#
# $$A_{in} = \sum_j p_j m_j, \qquad A_{out} = \sum_j p_j (1 - m_j), \qquad
# \mathrm{RAC} = -\log A_{in} - \log (1 - A_{out}).$$
#
# `attention_terms` computes this, for all layers and samples at once, without ever writing out $p$. By hand it is
# the same:

# %%
region = BoxRegion(boxes, (8, 8))
terms = attention_terms(attention_before, region)

inside = (map_before * region.mask()).sum(-1)
torch.testing.assert_close(terms.in_box, inside)
torch.testing.assert_close(terms.rac, -2 * inside.log(), rtol=1e-4, atol=1e-5)  # 1 - A_out = A_in

# %% [markdown]
# ## MRC: but not at any price
#
# RAC alone would be content with all attention on one token of the box. The *momentum teacher* is a moving average
# of the model, $\theta' \leftarrow 0.9\, \theta' + 0.1\, \theta$ after each optimizer step. Its map $t$ holds the
# student's back:
#
# $$\mathrm{MRC} = \mathrm{KL}(t \,\|\, p) = \sum_j t_j (\log t_j - \log p_j).$$

# %%
teacher = MomentumTeacher(model, make_tap)

# %% [markdown]
# ## rho: the layers where attention matters count more
#
# $\rho_l$ is Spearman's rank correlation, over the batch, between $A_{in}$ in layer $l$ and the IoU of the
# predicted box. Layers above the average weigh more than 1, the others less:
#
# $$\rho'_l = \rho_l - \bar\rho + 1, \qquad L_{AR} = \sum_l \rho'_l\, \mathrm{RAC}_l + \sum_l \mathrm{MRC}_l.$$
#
# ## DAT: hard samples count more
#
# The box loss of a sample is weighted by how hard it is: *actually*, by its own $L_{AR}$, and *objectively*, by the
# size of its box. An easy sample weighs about 1, a hard one up to 1.5 times 1.23:
#
# $$W_{ADW} = \frac12 + \frac{1}{1 + e^{-L_{AR}}}, \qquad W_{ODW} = \frac12 + \frac{1}{1 + e^{\,\mathrm{area} - 1}},$$
#
# $$L = \frac1B \sum_b L_{AR} + W_{ODW} W_{ADW} (L_1 + 1 - \mathrm{GIoU}).$$
#
# `AttBalanceLoss` is all of that. Its output has the parts of each sample, for logging.

# %%
criterion = AttBalanceLoss(AttBalanceConfig())  # the paper's choices; each can be changed here
output = criterion(terms, predicted_before, boxes)

by_hand = output.attention + output.odw * output.adw * (output.l1 + output.giou)  # giou is the loss, 1 - GIoU
torch.testing.assert_close(output.loss, by_hand.mean())
torch.testing.assert_close(output.adw, 0.5 + output.attention.sigmoid())
torch.testing.assert_close(output.odw, 0.5 + (1 - boxes[:, 2:].prod(1)).sigmoid())

# %% [markdown]
# ## Training
#
# The five lines that are not in a plain loop are marked. In the last third the terms are off, as in the paper, and
# the loss is the plain box loss.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
history = []
for step in range(options.steps):
    seen_pictures, seen_words, seen_boxes = scenes(32, seed=step)
    terms = None
    teacher.update(model)  # +
    with tap.recording():  # +
        predicted = model(seen_pictures, seen_words)
    if step < 2 * options.steps // 3:
        seen = teacher.attention(seen_pictures, seen_words)  # +
        terms = attention_terms(tap.attention(), BoxRegion(seen_boxes, (8, 8)), teacher=seen)  # +
    output = criterion(terms, predicted, seen_boxes)  # +
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    if terms is not None:
        history.append((terms.in_box.detach().mean(1), output.rho, output.adw.detach(), output.odw.detach()))

# %% [markdown]
# ## Before and after


# %%
def summary(name: str, predicted: Tensor, attention: QueryAttention) -> None:
    result = criterion(None, predicted, boxes)
    in_box = attention_terms(attention, region).in_box[-1].mean()
    accuracy = (result.iou >= 0.5).float().mean()
    print(f"{name:<7} loss {result.loss:.3f}  accuracy {accuracy:6.1%}  attention in the box {in_box:.3f}")


def draw_box(axes: plt.Axes, box: Tensor, colour: str) -> None:
    x, y, width, height = (32 * box).tolist()
    corner = (x - width / 2 - 0.5, y - height / 2 - 0.5)
    axes.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=2))


predicted_after, attention_after = look(model)
map_after = attention_map(attention_after)
summary("before", predicted_before, attention_before)
summary("after", predicted_after, attention_after)

figure, rows = plt.subplots(3, 4, figsize=(9, 7), constrained_layout=True)
columns = zip(("picture", "map before", "map after"), rows, strict=True)
for title, row in columns:
    row[0].set_ylabel(title)
    for sample, axes in enumerate(row):
        if title == "picture":
            axes.imshow(pictures[sample, :3].permute(1, 2, 0).clamp(0, 1))
            draw_box(axes, predicted_after[sample], "white")
        else:
            last_layer = (map_before if title == "map before" else map_after)[-1]
            axes.imshow(last_layer[sample].view(8, 8), extent=(-0.5, 31.5, 31.5, -0.5), cmap="magma", vmin=0)
        draw_box(axes, boxes[sample], "lime")
        axes.set(xticks=[], yticks=[])
figure.suptitle("The last layer's supervised map; the true box in green, the predicted one in white")
figure.savefig(options.out / "attention.png", dpi=100)

# %% [markdown]
# ## What to watch
#
# * *Attention in the box* should rise within the first hundred steps, in every supervised layer.
# * *rho* is positive while some samples have attention in the box and a good box, and others neither. Once
#   attention is in the box everywhere, there is nothing left to correlate, and it falls. That is no bad sign.
# * *The difficulty weights*: a weight that is the same for all samples does nothing but scale the box loss.

# %%
in_box, rho = (torch.stack(values) for values in list(zip(*history, strict=True))[:2])
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
for layer in range(4):
    left.plot(in_box[:, layer], label=f"layer {layer + 3}")
    middle.plot(rho[:, layer], linewidth=0.8)
left.set(title="attention in the box", xlabel="step", ylim=(0, 1))
left.legend()
middle.set(title="rho", xlabel="step")
for name, (_, _, adw, odw) in (("first step", history[0]), ("last step", history[-1])):
    right.scatter(odw, adw, s=12, label=name)
right.set(title="difficulty weights", xlabel="W_odw", ylabel="W_adw", ylim=(0.95, 1.55))
right.legend()
figure.savefig(options.out / "training.png", dpi=100)

print("rho of the last step, by layer:", [round(value, 2) for value in history[-1][1].tolist()])
for name, (_, _, adw, odw) in (("first", history[0]), ("last", history[-1])):
    weights = ", ".join(f"{low:.2f} to {high:.2f}" for low, high in ((adw.min(), adw.max()), (odw.min(), odw.max())))
    print(f"W_adw and W_odw in the {name} step with terms: {weights}")

# %% [markdown]
# ## When it does not help
#
# Look at these, in this order.
#
# 1. **Is the region where the object is?** Draw `BoxRegion(...).mask()` and the map over a picture, as above. Boxes
#    are cxcywh in [0, 1] *of the padded canvas*; tokens are row-major; several grids are listed in the tokens'
#    order. `terms.valid` is False where the region has no token.
# 2. **Is `visual` right?** One token too early or late shifts the whole map.
#    `attention_map(tap.attention()).shape[-1]` must be the number of visual tokens, and padded ones must be 0 in
#    the map.
# 3. **Does attention in the box rise?** If not, the terms do not reach the layers: is `loss` what you call
#    `backward` on, is the optimizer that of the student, does the model really attend from this query?
# 4. **Are the right layers supervised?** Not those where the query has not read the sentence yet: it cannot know
#    the box.
# 5. **Was there anything to gain?** Where attention is in the box without the terms, or rho is about 0 in the plain
#    model, its errors lie elsewhere.
# 6. **Do the terms crowd out the box loss?** Their gradients are larger than those of the box loss. With gradient
#    clipping the box loss's share shrinks. Compare norms; try `alpha_ar=0.3`, or a larger clip.
# 7. **Is W_adw stuck at 1.5?** $L_{AR}$ is summed over layers, so early in training every sample is "hard".
#    `difficulty_from="mean"` spreads the weights.
# 8. **Is the teacher alive?** `teacher.update(model)` once for each optimizer step, and saved with the checkpoint.
#    A teacher that is never updated holds the student at its first map.
# 9. **Are the terms off at the end?** The paper's are, for the last third (not for VLTVG).
# 10. **One seed is no result.** Compare several, with the same budget in time as well as in steps.
