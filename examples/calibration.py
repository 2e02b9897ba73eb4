"""A learning rate that was tuned at 64 samples a step, carried over to 256, and an epsilon that fits the gradients."""

import lightning as L
from digits import Classifier, Digits

from lightning_gradhist import OptimizerCalibration

if __name__ == "__main__":
    calibration = OptimizerCalibration(reference_batch_size=64, probe_batches=5)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[calibration])
    trainer.fit(Classifier(lr=3e-3), Digits(batch_size=256))

    result = calibration.result
    print(f"epsilon {result.epsilon:g}, learning rate {result.learning_rate:.4g} ({result.ratio:.3g} times)")
    print(f"noise scale {result.noise_scale.value:.0f} samples, {result.noise_scale.lower:.0f} or more")
