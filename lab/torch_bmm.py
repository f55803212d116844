#!/usr/bin/env python3
"""torch.bmm at M3's sizes (bf16, random data): the anchor the mainloop is held against.

Prints rows like the experiments do. Each product is timed alone, with an event pair per call.
"""

import json

import torch

SIZES = {  # E, M, N, K
    "30B-n1024 up": (64, 2048, 2048, 4096),
    "N 3072": (64, 2048, 3072, 2048),
    "7B-n256 up": (128, 1536, 512, 1536),
    "30B-n256 down": (256, 2048, 4096, 256),
}


def quantile(values, q):
    values = sorted(values)
    return values[int(q * (len(values) - 1) + 0.5)]


def main():
    for name, (e, m, n, k) in SIZES.items():
        for layout in ("A K, B K", "A K, B MN", "A MN, B MN"):
            a = torch.randn(e, m, k, device="cuda", dtype=torch.bfloat16)
            b = torch.randn(e, k, n, device="cuda", dtype=torch.bfloat16)
            if "A MN" in layout:
                a = a.transpose(1, 2).contiguous().transpose(1, 2)
            if "B K" in layout:
                b = b.transpose(1, 2).contiguous().transpose(1, 2)
            out = torch.empty(e, m, n, device="cuda", dtype=torch.bfloat16)
            times = []
            for i in range(25):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                torch.bmm(a, b, out=out)
                end.record()
                end.synchronize()
                if i >= 5:
                    times.append(begin.elapsed_time(end))
            ms = quantile(times, 0.5)
            row = {
                "experiment": "torch_bmm",
                "variant": f"torch.bmm, {layout}",
                "size": f"{name}: E {e}, M {m}, N {n}, K {k}",
                "ms": round(ms, 5),
                "ms_p10": round(quantile(times, 0.1), 5),
                "ms_p90": round(quantile(times, 0.9), 5),
                "tflops": round(2 * e * m * n * k / ms * 1e-9, 1),
            }
            print("ROW " + json.dumps(row), flush=True)
    x = torch.randint(0, 1 << 30, (1 << 30,), device="cuda", dtype=torch.int32)
    y = torch.empty_like(x)
    times = []
    for i in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    ms = quantile(times[2:], 0.5)
    row = {
        "experiment": "torch_copy",
        "variant": "device copy, 4.3 GB",
        "ms": round(ms, 4),
    }
    row["tb_s"] = round(2 * x.numel() * 4 / ms * 1e-9, 3)
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
