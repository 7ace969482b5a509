"""Example inputs and outputs as flat tuples of tensors."""

import pytest
import torch
from tiny_networks import TwoInputs, plain
from torch import nn

import export
from export.tensors import example_tuple, outputs_of, repeat_to, resting_copy


def test_a_batch_is_repeated_or_shortened_without_new_values():
    x = torch.arange(6).reshape(3, 2)
    assert repeat_to(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert repeat_to(x, 1).tolist() == [[0, 1]]


def test_a_resting_copy_leaves_its_original_alone():
    model = plain().train()
    resting = resting_copy(model)
    assert model.training
    assert not resting.training
    assert not {id(p) for p in model.parameters()} & {id(p) for p in resting.parameters()}


def test_outputs_are_the_leaves_in_order():
    outputs = outputs_of(TwoInputs(), (torch.randn(2, 6), torch.tensor([0, 1])))
    assert [tuple(output.shape) for output in outputs] == [(2, 4), (2, 4), (2,)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "no example input"),
        ((torch.zeros(1), 3), "is a int, not a tensor"),
        ({"x": torch.zeros(1)}, "the example inputs are a mapping"),
        (torch.zeros(1, dtype=torch.bfloat16), "dtype torch.bfloat16"),
        (torch.tensor(1.0), "has no batch"),
        (torch.zeros(2, 0), "or no values"),
        ((torch.zeros(2), torch.zeros(3)), "2 different batch sizes"),
    ],
)
def test_impossible_examples_are_refused(inputs, message):
    with pytest.raises(export.NotExportable, match=message):
        example_tuple(inputs)


def test_a_network_that_does_not_run_says_so():
    with pytest.raises(export.NotExportable, match="the network does not run"):
        outputs_of(plain(), (torch.zeros(1, 4, 8, 8),))


def test_an_output_that_no_file_of_ours_holds_is_refused():
    with pytest.raises(export.NotExportable, match=r"the network returns torch\.bfloat16"):
        outputs_of(nn.Linear(2, 2).bfloat16(), (torch.zeros(1, 2, dtype=torch.bfloat16),))


def test_random_numbers_in_a_network_do_not_disturb_the_callers():
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    before = torch.get_rng_state()
    outputs_of(Noisy(), (torch.zeros(4),))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_output_is_refused():
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    with pytest.raises(export.NotExportable, match="returns NoneType without a tensor"):
        outputs_of(Silent(), (torch.zeros(1),))


def test_a_network_that_cannot_be_copied_is_refused():
    model = plain()
    model.cache = (line for line in "ab")  # a generator cannot be copied
    with pytest.raises(export.NotExportable, match="cannot be copied"):
        resting_copy(model)
