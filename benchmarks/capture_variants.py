"""What is trained in the benchmark of the capture, and what watches the gradients of it: ours and the peers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from optim_implementations import peer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradhist import GradientHistogramMonitor

DEFAULT_CADENCE, CADENCE_IN_TURN = 50, 2
RUN = 10_000  # steps of the run that an added time a step is given for
NONE, NONE_AGAIN = "none", "none, again"
DEFAULT, EVERY_STEP, OFF_STEPS = "monitor", "monitor, every step", "monitor, off-steps"
NO_NOISE, FIRST_STEPS = "monitor, every step, noise_scale=False", "monitor, first 100 steps"
NOISE_SHARE = 0.28  # of that run's pairs of steps, where each step is logged: all in 1,000 steps, then one in ten steps
ADD_HISTOGRAM, WANDB = "add_histogram", "wandb.watch"
ADAMW = partial(torch.optim.AdamW, lr=1e-3)


@dataclass(frozen=True)
class Task:
    name: str
    network: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]  # makes inputs and labels of that many samples
    batch_size: int
    batch_shape: str  # for the reader
    steps: int  # of a turn
    only_on: str = ""  # a device, where another one would take too long


def tasks(scale: float = 1.0) -> list[Task]:
    """The models; below a scale of 1, for a try-out, with about that share of the parameters, and shorter turns."""
    many, few = (128, 32) if scale == 1 else (32, 32)  # 16 logged steps at least, and so three heatmaps
    width = max(8, 8 * round(64 * scale**0.5 / 8))
    layers, inner, words = max(1, round(6 * scale)), max(8, 64 * round(8 * scale**0.5)), max(16, round(12_000 * scale))
    linears = max(4, round(1000 * scale))
    images, vectors = partial(_noise, (3, 32, 32)), partial(_noise, (32,))

    def decoder(name: str, deeper: int = 1, wider: int = 1, only_on: str = "") -> Task:
        network = partial(Decoder, deeper * layers, wider * inner, deeper * words)
        return Task(name, network, partial(_text, deeper * words), 4, "4 x 128 tokens", few, only_on)

    return [
        Task("CNN", partial(cnn, width), images, 128, "128 x 3 x 32 x 32", many),
        Task("MLP", partial(mlp, 16 * width), partial(_noise, (8 * width,)), 128, f"128 x {8 * width}", many),
        decoder("transformer"),
        Task("small tensors", partial(small_tensors, linears), vectors, 128, "128 x 32", few),
        decoder("transformer, 350 M", deeper=4, wider=2, only_on="cuda"),
    ]


def cnn(width: int = 64) -> nn.Module:
    """Five convolutions and a linear layer; 1.1 M parameters in 12 tensors at a width of 64."""
    channels = [3, width, 2 * width, 2 * width, 4 * width, 4 * width]
    layers: list[nn.Module] = []
    for index, (ins, outs) in enumerate(zip(channels, channels[1:], strict=False)):
        layers += [nn.Conv2d(ins, outs, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * (index in (0, 1, 3))]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * width, 10))


def mlp(width: int = 1024) -> nn.Module:
    """Three linear layers; 2.1 M parameters in 6 tensors at a width of 1,024."""
    half = width // 2
    return nn.Sequential(nn.Linear(half, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, half))


class Decoder(nn.Module):
    """A causal transformer with tied embeddings: 25.1 M parameters in 76 tensors with 6 layers of 512, 12,000 words."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(128, width))
        sizes = (width, max(1, width // 64), 4 * width, 0.0, "gelu")
        block = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        hidden = self.blocks(self.words(tokens) + self.places[:length], mask, is_causal=True)
        return hidden.flatten(0, 1) @ self.words.weight.T


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.1 * self.linear(inputs).tanh()


def small_tensors(linears: int = 1000) -> nn.Module:
    """1,000 linear layers of 32, which are 2,000 tensors and 1.06 M parameters."""
    return nn.Sequential(*(_Residual(32) for _ in range(linears - 1)), nn.Linear(32, 10))


def _noise(shape: tuple[int, ...], samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, *shape), torch.randint(10, (samples,))


def _text(words: int, samples: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(words, (samples, 129))
    return tokens[:, :-1], tokens[:, 1:]


class Training(L.LightningModule):
    """A network under torch's AdamW with its defaults, or another optimizer; nothing is logged."""

    def __init__(self, network: nn.Module, optimizer: Any = ADAMW) -> None:
        super().__init__()
        self.network, self.loss_function, self.optimizer = network, nn.CrossEntropyLoss(), optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_function(self.network(batch[0]), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def made(task: Task, steps: int, batch_size: int | None = None) -> tuple[Training, DataLoader]:
    """A module and a loader of one batch, again and again, that no time goes into; the same at every call."""
    torch.manual_seed(0)
    size = batch_size or task.batch_size
    module, batch = Training(task.network()), task.batch(size)
    return module, DataLoader(range(steps * size), size, collate_fn=lambda _: batch)


@dataclass(frozen=True)
class Variant:
    name: str
    callbacks: Callable[[Task], list[L.Callback]]  # raises LeftOut where they cannot be
    every_n_steps: int = 1  # from one logged step of a run to the next
    every_n_steps_in_turn: int = 1
    measures_noise: bool = False
    draws: bool = False  # a heatmap at the 4th, 16th, 64th, ... logged step
    distribution: str = ""  # of a peer; ours and torch's versions have columns of their own
    steps: int = 0  # of a turn, all of which count; else those of the task, of which the later ones do

    @property
    def is_denser_in_turn(self) -> bool:
        """Whether a turn measures noise at more of the logged steps than a run does."""
        return self.measures_noise and self.every_n_steps == 1


def variants() -> list[Variant]:
    """All, the one that the others are held against first."""
    return [
        Variant(NONE, lambda task: []),
        Variant(NONE_AGAIN, lambda task: []),
        monitor(DEFAULT, DEFAULT_CADENCE),
        monitor(EVERY_STEP, 1),
        monitor("monitor, every step, group_by=1", 1, group_by=1),
        monitor(NO_NOISE, 1, noise_scale=False),
        Variant(FIRST_STEPS, lambda task: [GradientHistogramMonitor()], steps=100),
        Variant(OFF_STEPS, lambda task: [GradientHistogramMonitor(every_n_steps=10**9)]),
        Variant(ADD_HISTOGRAM, lambda task: [LambdaCallback(on_before_optimizer_step=_add_histogram)]),
        Variant(WANDB, lambda task: [_WandbWatch(peer("wandb"))], distribution="wandb"),
    ]


def monitor(name: str, every_n_steps: int, **options: Any) -> Variant:
    in_turn, with_noise = min(every_n_steps, CADENCE_IN_TURN), options.get("noise_scale", True)
    callbacks = lambda task: [GradientHistogramMonitor(in_turn, **options)]  # noqa: E731
    return Variant(name, callbacks, every_n_steps, in_turn, with_noise, draws=True)


def _add_histogram(trainer: Any, module: Any, optimizer: Any) -> None:
    """What one writes by hand: each gradient into TensorBoard, at every step."""
    for name, parameter in module.named_parameters():
        trainer.logger.experiment.add_histogram(f"gradients/{name}", parameter.grad, trainer.global_step)


class _WandbWatch(L.Callback):
    """``wandb.watch`` of the gradients at every step, into a run that is offline."""

    def __init__(self, wandb: Any) -> None:
        self.wandb = wandb

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # without what wandb says and measures about the machine
        quiet = self.wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        self.run = self.wandb.init(mode="offline", dir=trainer.logger.log_dir, settings=quiet)
        self.run.watch(pl_module, log="gradients", log_freq=1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.run.log({"step": trainer.global_step})  # commits the histograms of this step

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.unwatch(pl_module)
        self.run.finish()
