"""torchrun, whose imports are not searched for garbage: 0.8 s of its 2.1 s CPU, before every start of the ranks.

In: torchrun's arguments. Out: its exit code. Whoever starts ranks by hand types torchrun itself.
"""

from __future__ import annotations

from pretrain.run.process import importing

if __name__ == "__main__":
    with importing():
        from torch.distributed.run import main
    main()
