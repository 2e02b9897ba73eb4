"""Watch the gradient magnitudes of every layer: one callback, then ``tensorboard --logdir lightning_logs``."""

import lightning as L
from digits import Classifier, Digits

from lightning_gradhist import GradientHistogramMonitor

if __name__ == "__main__":
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[GradientHistogramMonitor(every_n_steps=10)])
    trainer.fit(Classifier(lr=3e-3), Digits(batch_size=64))
    print(f"Look at the gradients:  tensorboard --logdir {trainer.log_dir}")
