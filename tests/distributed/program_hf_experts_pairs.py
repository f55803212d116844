"""Four ranks of expert parallelism, two and two of which share a batch (tensor parallelism)."""

import hf_models
import ranks
import torch.distributed as dist
from comparison import compare_gradients, same
from program_hf_experts import batches, loaded, saved, step


def case_pairs_of_ranks_share_a_batch():
    """13 tokens: 7 for one of a pair and 6 for the other."""
    ids = batches(13)[:2, :1]
    stock, _ = saved("qwen3_moe")
    logits, right = step(hf_models.exact(stock), ids.flatten(0, 1))
    model = loaded("qwen3_moe", fsdp_size=2, tp_size=2, ep_size=4)
    batch = dist.get_rank() // 2
    ours, gradients = step(model, ids[batch])
    same(ours, logits[batch : batch + 1], 1e-4)
    compare_gradients(gradients, right, 1e-4)


if __name__ == "__main__":
    ranks.main()
