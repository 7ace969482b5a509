"""Gates in a plain torch loop of your own: what `diffprune.compress` does, without its recipe."""

import torch
import torch.nn.functional as F

import diffprune
import surgery
from diffprune.budget import Budget
from diffprune.data import load_data
from diffprune.landing import land
from diffprune.models import load_model
from diffprune.recover import accuracy, recalibrate_
from diffprune.search import follow_

data = load_data("digits", batch=64)
model = load_model("digits:resnet18")
example = next(iter(data.val))[0][:2]
budget = Budget(macs=0.5)

graph = surgery.trace(model, example)
gated = diffprune.attach(model, graph)
weights = torch.optim.SGD(gated.parameters_of_model(), lr=0.03, momentum=0.9)
gates = torch.optim.Adam(gated.parameters_of_gates(), lr=0.05)
for images, labels in data.train:
    follow_(gated, budget, budget.share)  # the expected cost of this step is the budget
    loss = F.cross_entropy(gated(images), labels)
    weights.zero_grad()
    gates.zero_grad()
    loss.backward()
    weights.step()
    gates.step()

landing = land(budget, gated.size, gated.scores())
keep = gated.size.keep(landing.flat)
plain = gated.folded(landing.flat)
small = surgery.cut(plain, graph, keep)
surgery.check_equal(surgery.mask(plain, graph, keep), small, example)
recalibrate_(small, data.train)
print(f"{landing.reached:.1%} of the MACs, accuracy {accuracy(small, data.val)[0]:.1%}")
