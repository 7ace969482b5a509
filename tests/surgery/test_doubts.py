"""What is supposed of numbers that a forward spells out comes to an end."""

import pytest
import torch
from torch import nn

from surgery.doubts import settle
from surgery.names import NEUTRAL, Names
from surgery.observed import Doubt, Observed


def test_constants_between_channels_do_not_keep_it_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Observed()
    rows = torch.stack([seen.names.fresh(4), torch.full((4,), NEUTRAL), seen.names.fresh(4)])
    seen.doubts.append(Doubt("view at a line", "view spells out sizes", rows[None], (1, 3, 4), ""))
    rounds = iter(range(5))
    classes = Names.classes
    monkeypatch.setattr(Names, "classes", lambda names: (next(rounds), classes(names))[1])
    label = settle(seen, nn.Identity(), {}, {}).label
    assert torch.equal(label[:4], label[4:])
