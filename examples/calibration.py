"""A learning rate that was tuned at 16 samples a step, carried over to 64, and an epsilon that fits the gradients."""

import lightning as L
from digits import Classifier, Digits

from lightning_gradhist import OptimizerCalibration

if __name__ == "__main__":
    calibration = OptimizerCalibration(reference_batch_size=16, probe_batches=22)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[calibration])
    trainer.fit(Classifier(lr=3e-3), Digits(batch_size=64))

    result = calibration.result
    print(f"epsilon {result.epsilon:g}, learning rate {result.learning_rate:.4g} ({result.ratio:.3g} times)")
    noise = result.noise_scale
    print(f"noise scale {noise.value:.0f} samples, between {noise.lower:.0f} and {noise.upper:.0f}")
