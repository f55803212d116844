"""The trainer on four processes: experts over two of them, their shards over the other two."""

import program_trainer
import ranks
from program_trainer import CONFIG, close, steps, trainer

from trainer.layout import Layout


def case_experts_spread_and_sharded():
    both = Layout(ep=2)
    close(steps(trainer(CONFIG, both), 3), steps(trainer(CONFIG), 3), 1e-4)
    program_trainer.goes_on(both, Layout(ep=4))
    program_trainer.goes_on(Layout(fsdp=True), both)


if __name__ == "__main__":
    ranks.main()
