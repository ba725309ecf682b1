"""pretrain.py with DistributedDataParallel in the place of FSDP2; here is what differs.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py
    torchrun --standalone --nproc-per-node 4 examples/train_ddp.py --resume

All ranks have all parameters, and DDP averages their gradients. Each rank orthogonalizes its share
of the matrices; the step gathers the updates, and all ranks end up with the same bits. The options,
the checkpoints and what --out gets are those of pretrain.py.
"""

import pretrain
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Trainer(pretrain.Trainer):
    def spread(self) -> None:
        parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.forward = self.autocast(parallel.__call__)
        self.mesh = dist.group.WORLD  # without it every rank would do all the work


if __name__ == "__main__":
    pretrain.main(Trainer)
