"""A loop of your own, here with Lightning Fabric: gradient histograms in TensorBoard, and the noise scale of the run."""

import torch
from digits import Classifier, Digits
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhist import MagnitudeHistogram
from lightning_gradhist.logging.magnitude_report import magnitude_report
from lightning_gradhist.logging.sinks import sink_of
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.step import measure_pair, noise_and_signal

if __name__ == "__main__":
    fabric, network, size = Fabric(accelerator="cpu", devices=1), Classifier(), 64
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=3e-3))
    noise, sink = NoiseRecord(), sink_of(SummaryWriter("fabric_logs"))
    batches = (batch for _ in range(3) for batch in fabric.setup_dataloaders(Digits(size).train_dataloader()))
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(images), labels))
        if step % 6 < 2:  # every sixth step, and the one after it
            gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
            if step % 6 == 0:  # DDP has averaged: one rank may count for all
                histogram = MagnitudeHistogram(list(gradients), fabric.device)
                histogram.update(gradients)
                report = magnitude_report(histogram.to("cpu"), "gradient")
                sink.scalars(report.scalars, step)
                sink.histograms(report.histograms, step)
                first = gradients
            else:  # two gradients of `samples` each, whose distance is noise and whose product is signal
                samples = size * fabric.world_size
                distance = measure_pair(first, gradients, None)
                noise.add(step - 1, samples, noise_and_signal(distance, 2 / samples, 0.0, samples))
        optimizer.step()
    sink.writer.close()
    scale = noise.estimate("simple")
    print(f"noise scale {scale.value:.0f} samples, from {scale.measurements} pairs: tensorboard --logdir fabric_logs")
