"""The head in a plain PyTorch loop, with a lambda that follows the training accuracy.

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
    """Draw samples of ten classes in 32 dimensions: a class centre plus noise."""
    target = torch.randint(10, (size,))
    return CENTRES[target] + torch.randn(size, 32), target


torch.manual_seed(0)
network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
head = LSoftmaxLinear(in_features=64, num_classes=10, margin=4)
schedule = AccuracyFeedback()
margin_accuracy = 0.0  # running mean of the accuracy with the margin
optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.05, momentum=0.9)

for step in range(STEPS):
    x, target = batch(64)
    head.lambda_ = schedule(step, STEPS, margin_accuracy)  # from 1000 (softmax) towards 0 (the full margin)
    logits = head(network(x), target)  # with the margin
    correct = (logits.argmax(1) == target).float().mean().item()
    margin_accuracy += (1 - schedule.accuracy_decay) * (correct - margin_accuracy)
    loss = F.cross_entropy(logits, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss.item():.3f}, lambda {head.lambda_:.3g}")

network.eval()
with torch.no_grad():
    x, target = batch(2000)
    test_accuracy = (head(network(x)).argmax(1) == target).float().mean().item()  # logits without the margin
print(f"accuracy {test_accuracy:.3f}")
