import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tiny networks: a second thread mostly waits, and for long on a busy machine
