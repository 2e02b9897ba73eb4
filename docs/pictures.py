"""The pictures of the docs and of the README, each from a small training run on scikit-learn's handwritten digits.

``PYTHONPATH=examples python docs/pictures.py`` makes them all, in three minutes; names after it make only those. Runs are
real, with the real callbacks: what is broken is broken in the model. Two pictures without data are drawn.
"""

from __future__ import annotations

import functools
import io
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
from demo import Mlp
from digits import Classifier, Digits, NoisyDigits
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from torch import Tensor, nn

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.__main__ import main as gradhist
from lightning_gradhist.logging import Sink, register_sink
from lightning_gradhist.noise import RunRecord

HERE = Path(__file__).parent
OUT = HERE / "pictures"
README = HERE.parent / "examples" / "readme.png"
BLUE, ORANGE, GREY, RED = "#1f5fa8", "#d9661f", "#8a8f98", "#d4143a"


class Album(Logger):
    """A logger that keeps what it is given."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.figures: dict[str, Figure] = {}
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.histograms: list[tuple[int, dict[str, Any]]] = []

    name, version = "album", 0

    @property
    def log_dir(self) -> str:
        """Where the monitor leaves the record."""
        return self.folder

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Of the module's own, which no picture shows."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nor these."""

    @property
    def record(self) -> Path:
        """The record of the run."""
        return Path(self.folder) / "calibration.json"


class AlbumSink(Sink):
    """Puts into the album what the callbacks report."""

    def __init__(self, album: Album) -> None:
        self.album = album

    def scalars(self, values: Any, step: int) -> None:
        """Numbers by tag."""
        self.album.scalars.append((step, dict(values)))

    def histograms(self, histograms: Any, step: int) -> None:
        """Histograms by tag."""
        self.album.histograms.append((step, dict(histograms)))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """The last one of each tag is kept."""
        self.album.figures[tag] = figure


register_sink(Album, AlbumSink)


class Module(L.LightningModule):
    """A network, its loss in some unit, and an optimizer.

    Args:
        net: from images to ten logits.
        optimizer: makes the optimizer from the parameters.
        unit: what the loss is multiplied by.
        squares: whether the loss is that of squares, and not cross-entropy.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], unit: float = 1.0, squares: bool = False) -> None:
        super().__init__()
        self.net, self.optimizer, self.unit, self.squares = net, optimizer, unit, squares

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        logits = self.net(batch[0].flatten(1))
        if self.squares:
            return (logits - nn.functional.one_hot(batch[1], 10)).square().sum(1).mean() * self.unit
        return nn.functional.cross_entropy(logits, batch[1]) * self.unit

    def configure_optimizers(self) -> Any:
        """The optimizer."""
        return self.optimizer(self.net.parameters())


class Residual(nn.Module):
    """A block ``x + down(act(up(x)))``."""

    def __init__(self, width: int, act: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.act, self.gain = nn.Linear(width, width), nn.Linear(width, width), act, gain

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.gain * self.down(self.act(self.up(x)))


def residual_net(blocks: int = 4, width: int = 48) -> nn.Sequential:
    """A residual network that trains well."""
    net = nn.Sequential()
    net.add_module("stem", nn.Linear(64, width))
    for i in range(blocks):
        net.add_module(f"block{i}", Residual(width, nn.ReLU(), 0.5))
    net.add_module("norm", nn.LayerNorm(width))
    net.add_module("head", nn.Linear(width, 10))
    return net


def train(
    module: L.LightningModule,
    *callbacks: L.Callback,
    batch_size: int = 32,
    steps: int = 120,
    data: type[Digits] = Digits,
) -> Album:
    """Trains, and returns what was logged."""
    album = Album(tempfile.mkdtemp())
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=album,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, data(batch_size))
    return album


def adamw(lr: float = 3e-3, **options: Any) -> Callable[..., Any]:
    """AdamW over the parameters that it is given."""
    return lambda params: torch.optim.AdamW(params, lr=lr, **options)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A network from one seed."""
    L.seed_everything(0, verbose=False)
    return make()


def heatmap(album: Album, title: str, kind: str = "gradient_magnitude") -> Figure:
    """The heatmap that the monitor has drawn last, under a title of its own."""
    figure = album.figures[f"{kind}_by_layer"]
    axes = figure.axes[0]
    axes.set_title("")
    axes.set_title(title, fontsize=10, loc="left", pad=16)
    axes.set_yticks(axes.get_yticks(), [label.get_text().removeprefix("net.") for label in axes.get_yticklabels()])
    return figure


def point_at(figure: Figure, row: str, text: str, x: float, place: tuple[float, float], color: str = RED) -> None:
    """An arrow to a row of a heatmap.

    Args:
        figure: with the heatmap.
        row: its label.
        text: at the arrow's tail.
        x: where the arrow ends, log10 of the magnitude.
        place: of the text, in shares of the axes.
        color: of both.
    """
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    axes.annotate(
        text,
        (x, labels.index(row) + 0.5),
        xytext=place,
        textcoords="axes fraction",
        color=color,
        fontsize=9.5,
        ha="center",
        va="center",
        arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.4},
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": color, "linewidth": 0.8},
    )


def blank(width: float = 6.4, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure, and its axes."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def image_of(figure: Figure) -> Image.Image:
    """A figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def save(image: Image.Image | Figure, path: Path) -> None:
    """Writes a small PNG."""
    image = image if isinstance(image, Image.Image) else image_of(image)
    path.parent.mkdir(exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE, kmeans=1).save(path, optimize=True)


def above(*figures: Figure) -> Image.Image:
    """Images one above the other, of one width."""
    images = [image_of(figure) for figure in figures]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole


def beside(*figures: Figure) -> Image.Image:
    """Images in a row, as high as the highest."""
    images = [image_of(figure) for figure in figures]
    height = max(image.height for image in images)
    whole = Image.new("RGB", (sum(image.width for image in images), height), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, (height - image.height) // 2))
        left += image.width
    return whole


# How to read it


def healthy() -> Figure:
    """A residual network that learns."""
    album = train(Module(seeded(residual_net), adamw()), GradientHistogramMonitor(10, exclude="bias"))
    return heatmap(album, "Healthy: all rows within two or three decades")


def sigmoids() -> nn.Sequential:
    """Nine layers of sigmoids, which each pass on a quarter of the gradient at most."""
    layers: list[nn.Module] = [nn.Linear(64, 48), nn.Sigmoid()]
    for _ in range(8):
        layers += [nn.Linear(48, 48), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(48, 10))


def vanishing() -> Figure:
    """Gradients that shrink from layer to layer on their way back."""
    album = train(Module(seeded(sigmoids), adamw()), GradientHistogramMonitor(10, exclude="bias"), steps=60)
    figure = heatmap(album, "Vanishing: a staircase to the left")
    point_at(figure, "0.weight", "the first layer gets least", -9.4, (0.72, 0.84))
    return figure


def exploding() -> Figure:
    """A rate that is a little too high: every step makes the gradient larger than the one before."""
    net = seeded(lambda: nn.Sequential(nn.Linear(64, 10)))
    module = Module(net, lambda params: torch.optim.SGD(params, lr=0.3), squares=True)
    album = train(module, GradientHistogramMonitor(1), steps=64)
    return over_steps(album, "Exploding: higher with every step, then not finite")


def over_steps(album: Album, title: str) -> Figure:
    """The histogram of all gradients, step by step, until none is finite."""
    figure, axes = blank()
    finite = [shown["gradient_magnitude/all"] for _, shown in album.histograms if "gradient_magnitude/all" in shown]
    edges = torch.linspace(-6, 40, 185, dtype=torch.float64)
    table = torch.zeros(len(finite), len(edges) - 1, dtype=torch.float64)
    for row, shown in zip(table, finite, strict=True):
        middles = (shown.edges[1:] + shown.edges[:-1]).double() / 2
        row.index_add_(0, (torch.bucketize(middles, edges) - 1).clamp(0, len(row) - 1), shown.counts.double())
        row /= row.sum()
    last, steps = len(finite) - 0.5, len(album.histograms) - 0.5
    axes.imshow(
        table.T.numpy(),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="Blues",
        vmax=float(table[table > 0].quantile(0.95)),
        extent=(-0.5, last, -6, 40),
    )
    axes.axvspan(last, steps, color=RED, alpha=0.12)
    axes.text((last + steps) / 2, 17, "not finite", rotation=90, ha="center", va="center", color=RED)
    axes.set_xlim(-0.5, steps)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("log10 |gradient|, all layers")
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def dead_net() -> nn.Sequential:
    """A residual network of which one layer's ReLU never opens."""
    net = residual_net()
    with torch.no_grad():
        net.block2.up.bias.fill_(-20.0)
    return net


def dead() -> Image.Image:
    """A layer whose ReLU never opens."""
    album = train(Module(seeded(dead_net), adamw()), GradientHistogramMonitor(10, exclude="bias|norm"))
    figure = heatmap(album, "Dead: block2 has no row, its gradients are all zero")
    zeros = {
        tag.removeprefix("gradient_zero_share/net."): value
        for tag, value in album.scalars[-1][1].items()
        if tag.startswith("gradient_zero_share/net.")
    }
    names = [name for name, _ in Module(residual_net(), adamw()).net.named_parameters() if "bias" not in name]
    names = [name for name in names if "norm" not in name]
    bars, axes = blank(figure.get_size_inches()[0], 2.4)
    shares = [100 * zeros.get(name, 0.0) for name in names]
    axes.barh(names, shares, color=[RED if share == 100 else BLUE for share in shares])
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("gradient_zero_share, percent")
    axes.set_title("Its share of zeros is 100%", fontsize=10, loc="left")
    return above(figure, bars)


def fp16() -> Figure:
    """A loss in small units: what float16 would not hold."""
    album = train(Module(seeded(residual_net), adamw(), unit=1e-5), GradientHistogramMonitor(10, exclude="bias"))
    figure = heatmap(album, "Underflow: left of the dashed line float16 has only zero")
    return figure


def epsilon() -> Image.Image:
    """The same run with an epsilon that is larger than the second moment, and with the one that the calibration takes."""
    pair = []
    for callbacks, title in (
        ((), "Epsilon too large: every row is left of it"),
        ((OptimizerCalibration(probe_batches=16),), "After OptimizerCalibration(): epsilon is out of the way"),
    ):
        monitor = GradientHistogramMonitor(10, exclude="bias", optimizer_state=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            album = train(Module(seeded(residual_net), adamw(), unit=1e-7), *callbacks, monitor)
        pair.append(heatmap(album, title, "optimizer_second_moment"))
    limits = [figure.axes[0].get_xlim() for figure in pair]
    for figure in pair:
        figure.axes[0].set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    return above(*pair)


@functools.cache
def recorded() -> Album:
    """The demo's run at 8 samples a step, with its record; made once."""
    L.seed_everything(0, verbose=False)
    return train(Mlp(64, lr=0.006), GradientHistogramMonitor(2), batch_size=8, steps=1440, data=NoisyDigits)


def noise() -> Figure:
    """The noise scale over a run so far, as it is charted."""
    charted = [(step, values) for step, values in recorded().scalars if step >= 40 and "noise_scale/adam" in values]
    steps = [step for step, _ in charted]
    value, low, high, size, critical = (
        [values.get(f"noise_scale/{name}", math.nan) for _, values in charted]
        for name in ("adam", "adam_lower", "adam_upper", "batch_size", "critical_batch_size")
    )
    figure, axes = blank()
    top = 8 * max(value)
    axes.fill_between(steps, low, [min(one, top) if one > 0 else top for one in high], color=BLUE, alpha=0.15)
    axes.plot(steps, value, color=BLUE, label="noise_scale/adam, with its interval")
    axes.plot(steps, critical, color=GREY, label="noise_scale/critical_batch_size")
    axes.plot(steps, size, color=ORANGE, linestyle="--", label="noise_scale/batch_size")
    axes.set_yscale("log")
    axes.set_ylim(0.7, top)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("samples")
    axes.set_title("Noise growing: far above the batch size", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


# Concepts


def _box(axes: Any, place: tuple[float, float], size: tuple[float, float], text: str, color: str, **style: Any) -> None:
    box = FancyBboxPatch(place, *size, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor=color, edgecolor="white")
    axes.add_patch(box)
    style = {"color": "white", "fontsize": 9, **style}
    axes.text(place[0] + size[0] / 2, place[1] + size[1] / 2, text, ha="center", va="center", **style)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = GREY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, linewidth=1.4))


def batch() -> Figure:
    """What an optimizer step is made of; drawn."""
    figure, axes = blank(6.4, 2.5)
    axes.set_axis_off()
    for rank in range(2):
        axes.text(-0.15, 1.25 - rank, f"GPU {rank}", ha="right", va="center", fontsize=9.5, color=GREY)
        for micro in range(4):
            _box(axes, (micro * 1.0, 1.0 - rank), (0.86, 0.5), "16 samples", BLUE)
    _arrow(axes, (3.98, 0.75), (4.75, 0.75))
    _box(axes, (4.85, 0.3), (1.75, 0.9), "one optimizer step\n128 samples", ORANGE, fontweight="bold", fontsize=8.5)
    axes.text(1.93, -0.35, "4 micro-batches: accumulate_grad_batches=4", ha="center", fontsize=9.5, color=GREY)
    axes.text(3.0, 1.85, "effective batch size = 16 samples × 4 micro-batches × 2 GPUs = 128", ha="center", fontsize=10)
    axes.set_xlim(-0.8, 6.75)
    axes.set_ylim(-0.55, 2.1)
    return figure


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(images), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def noise_scale() -> Figure:
    """Gradients of batches around the gradient of all data, at the weights after a short run."""
    L.seed_everything(0, verbose=False)
    module = Classifier(lr=3e-3)
    train(module, batch_size=16, steps=120)
    images, labels = Digits(16).train.tensors
    generator = torch.Generator().manual_seed(0)
    whole = _gradient(module, images, labels)
    along = whole / whole.norm()
    sideways = torch.randn(len(whole), generator=generator)
    sideways -= (sideways @ along) * along
    figure, axes = blank()
    sets = {size: [torch.randperm(1440, generator=generator)[:size] for _ in range(60)] for size in (16, 256)}
    grads = {size: [_gradient(module, images[one], labels[one]) for one in some] for size, some in sets.items()}
    deviations = torch.stack([g - whole for g in grads[16]])
    sideways = torch.linalg.svd(deviations - torch.outer(deviations @ along, along), full_matrices=False).Vh[0]
    unit = float(whole.norm())
    for size, color in ((16, GREY), (256, BLUE)):
        points = torch.stack([torch.stack([g @ along, g @ sideways]) for g in grads[size]]) / unit
        axes.plot(*points.T.tolist(), "o", color=color, alpha=0.7, markersize=5, label=f"batches of {size}")
    axes.annotate("", (1, 0), xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "linewidth": 2.4})
    axes.plot([], [], color=ORANGE, linewidth=2.4, label="gradient of all data")
    axes.set_xlabel("along the gradient of all data")
    axes.set_ylabel("across it")
    variance = deviations.square().sum(1).mean() / (1 - 16 / 1440)
    axes.set_title(f"Noise scale here: about {float(16 * variance / unit**2):,.0f} samples", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


@functools.cache
def carried() -> tuple[Album, str]:
    """A run of as many samples at 128 a step, calibrated from the record of the one at 8, and its report; made once."""
    L.seed_everything(0, verbose=False)
    calibration = OptimizerCalibration(reference=str(recorded().record))
    album = train(Mlp(64, lr=0.006), calibration, batch_size=128, steps=90, data=NoisyDigits)
    assert calibration.result is not None
    return album, calibration.result.to_text()


def reference() -> Figure:
    """The calibration's own figure of the rate over the batch size."""
    return carried()[0].figures["calibration/learning_rate_over_batch_size"]


def search_space() -> Figure:
    """The calibration's own figure of epsilon."""
    return carried()[0].figures["calibration/epsilon_search_space"]


def record() -> Figure:
    """What a record holds: measurements, and their mean over the run."""
    (entry,) = RunRecord.load(recorded().record).optimizers
    figure, axes = blank()
    known = [s for s in entry.samples if (s["signal_adam"] or 0) > 0 and (s["noise_adam"] or 0) > 0]
    points = [(s["step"], s["noise_adam"] * s["batch_size"] / s["signal_adam"]) for s in known]
    axes.plot(*zip(*points, strict=True), ".", color=GREY, markersize=3, alpha=0.6, label="one measurement")
    mean = entry.noise["adam"]
    axes.axhspan(mean.lower, mean.upper, color=BLUE, alpha=0.2)
    axes.axhline(
        mean.value, color=BLUE, label=f"over the run: {mean.value:,.0f} ({mean.lower:,.0f} to {mean.upper:,.0f})"
    )
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("noise scale, samples")
    axes.set_title(f"calibration.json: {mean.measurements} measurements", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def probe() -> Figure:
    """When the probe runs; drawn."""
    figure, axes = blank(6.4, 2.2)
    axes.set_axis_off()
    _box(axes, (0.0, 0.4), (1.0, 0.6), "fit starts", GREY)
    _box(axes, (1.35, 0.4), (2.1, 0.6), "probe: 32 batches\nforward and backward", BLUE)
    _box(axes, (3.8, 0.4), (1.25, 0.6), "eps and lr\nare set", ORANGE, fontweight="bold")
    _box(axes, (5.4, 0.4), (1.0, 0.6), "step 1, 2, ...", GREY)
    for start, end in ((1.03, 1.32), (3.48, 3.77), (5.08, 5.37)):
        _arrow(axes, (start, 0.7), (end, 0.7))
    axes.text(2.4, 0.14, "on copies, at frozen weights", ha="center", fontsize=9.5, color=BLUE)
    axes.text(5.9, 0.14, "same data, same random numbers", ha="center", fontsize=9.5, color=GREY)
    axes.text(3.2, 1.35, "The run goes on as if there had been no probe", ha="center", fontsize=10)
    axes.set_xlim(-0.1, 7.2)
    axes.set_ylim(0.0, 1.6)
    return figure


def plan() -> Image.Image:
    """The figure of the command ``plan``; what it prints, and the report of the run that is calibrated so, are texts."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(printed):
        path = Path(folder) / "plan.png"
        gradhist(["plan", str(recorded().record), "--batch-size", "32", "128", "1024", "--save", str(path)])
        image = Image.open(path).convert("RGB")
    (OUT / "plan.txt").write_text(printed.getvalue(), encoding="utf-8")
    report = "\n".join(line for line in carried()[1].splitlines() if not line.startswith("    "))
    (OUT / "report.txt").write_text(report.partition("  what more GPUs")[0].rstrip() + "\n", encoding="utf-8")
    return image


def tune() -> None:
    """What ``examples/tune_epsilon.py`` prints; two minutes."""
    command = [sys.executable, str(README.with_name("tune_epsilon.py"))]
    found = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    (OUT / "tune_epsilon.txt").write_text(found, encoding="utf-8")


# The README


def sick_net() -> nn.Sequential:
    """A residual network with a saturated layer, and one that multiplies its gradient."""
    net = residual_net()
    net.block1.act = nn.Tanh()
    net.block3.gain = 400.0
    with torch.no_grad():
        net.block1.up.weight.mul_(60)
        net.block1.up.bias.add_(25)
        net.block3.down.weight.mul_(1 / 400)
        net.block3.down.bias.mul_(1 / 400)
    return net


def readme() -> Image.Image:
    """A heatmap with a dead and an exploding layer beside epsilon's figure."""
    album = train(Module(seeded(sick_net), adamw(1e-4)), GradientHistogramMonitor(10, exclude="bias|norm"), steps=60)
    layers = heatmap(album, "The gradients of every layer")
    layers.set_size_inches(4.9, 3.5)
    point_at(layers, "block1.up.weight", "dead: its tanh is saturated", -7.5, (0.36, 0.9))
    point_at(layers, "block3.down.weight", "exploding: its output\nis multiplied by 400", -1.1, (0.36, 0.16))
    L.seed_everything(0, verbose=False)
    calibration = OptimizerCalibration(probe_batches=16)
    small = train(Module(seeded(residual_net), adamw(), unit=1e-6), calibration, steps=2)
    eps = small.figures["calibration/epsilon_search_space"]
    eps.set_size_inches(4.6, 3.5)
    eps.axes[0].set_title("Epsilon, before and after the calibration", fontsize=10, loc="left")
    eps.axes[0].legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return beside(layers, eps)


PICTURES = (healthy, vanishing, exploding, dead, fp16, epsilon, noise, batch, noise_scale, reference, record, probe,
            search_space, plan)  # fmt: skip


def main(names: list[str]) -> None:
    """Makes the pictures of these names, or all."""
    warnings.filterwarnings("ignore", module="lightning")
    for make in PICTURES:
        if not names or make.__name__ in names:
            save(make(), OUT / f"{make.__name__}.png")
    if not names or "readme" in names:
        save(readme(), README)
    if not names or "tune" in names:
        tune()
    for path in (*sorted(OUT.glob("*.png")), README):
        print(f"{path.stat().st_size / 1024:6.1f} KB  {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
