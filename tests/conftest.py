import torch

torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it computes
