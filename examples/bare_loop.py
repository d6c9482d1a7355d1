"""The head in a bare PyTorch loop, with a lambda that follows the training accuracy.

Run: python bare_loop.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsoftmax_lightning import LSoftmaxLinear
from lsoftmax_lightning.schedules import AccuracyFeedback

STEPS = 400
CENTRES = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Ten classes in 32 dimensions, under noise."""
    target = torch.randint(10, (size,))
    return CENTRES[target] + torch.randn(size, 32), target


torch.manual_seed(0)
network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
head = LSoftmaxLinear(in_features=64, num_classes=10, margin=4)
schedule, accuracy = AccuracyFeedback(), 0.0
optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.05, momentum=0.9)

for step in range(STEPS):
    x, target = batch(64)
    head.lambda_ = schedule(step, STEPS, accuracy)  # from plain softmax to the margin
    logits = head(network(x), target)  # these carry the margin
    accuracy += 0.05 * ((logits.argmax(1) == target).float().mean().item() - accuracy)
    loss = F.cross_entropy(logits, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss.item():.3f}, lambda {head.lambda_:.3g}")

network.eval()
with torch.no_grad():
    x, target = batch(2000)
    test_accuracy = (head(network(x)).argmax(1) == target).float().mean().item()  # plain logits, without the margin
print(f"accuracy {test_accuracy:.3f}")
