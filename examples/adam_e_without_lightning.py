"""AdamE in a plain training loop; nothing of Lightning is imported."""

import torch
from sklearn.datasets import load_digits

from lightning_gradhist import AdamE

if __name__ == "__main__":
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = AdamE(model.parameters(), lr=1e-2, alpha=-5.0, explore_beta=0.99)  # the paper's large-batch choice

    for step in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[:1440]), labels[:1440])
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1:3d}  loss {loss.item():.4f}")

    accuracy = (model(images[1440:]).argmax(1) == labels[1440:]).float().mean().item()
    print(f"accuracy on held-out digits {accuracy:.3f}")
