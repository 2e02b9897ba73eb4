"""A run that records its gradient noise, and a second one with four times the batch, calibrated from the record."""

from pathlib import Path

import lightning as L
from digits import Classifier, Digits

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration

if __name__ == "__main__":
    first = L.Trainer(max_epochs=8, accelerator="cpu", callbacks=[GradientHistogramMonitor(every_n_steps=2)])
    first.fit(Classifier(lr=3e-3), Digits(batch_size=32))

    record = Path(first.log_dir) / "calibration.json"
    calibration = OptimizerCalibration(reference=str(record), probe_batches=11)
    second = L.Trainer(max_epochs=8, accelerator="cpu", callbacks=[calibration])
    second.fit(Classifier(lr=3e-3), Digits(batch_size=128))
    print(
        f"learning rate {calibration.result.learning_rate:.4g}, {calibration.result.ratio:.3g} times the recorded one"
    )
