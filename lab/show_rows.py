#!/usr/bin/env python3
"""Prints the rows of an experiment run as a short table, or packs them into a results file.

show_rows.py rows.jsonl
show_rows.py rows.jsonl --pack results.json key=value...   (commit, device, command, ...)
"""

import json
import sys


def main():
    rows = [json.loads(line) for line in open(sys.argv[1])]
    if "--pack" in sys.argv:
        at = sys.argv.index("--pack")
        head = dict(pair.split("=", 1) for pair in sys.argv[at + 2 :])
        with open(sys.argv[at + 1], "w") as f:
            f.write("{\n")
            f.writelines(
                f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()
            )
            f.write(
                '  "rows": [\n    ' + ",\n    ".join(json.dumps(r) for r in rows) + "\n  ]\n}\n"
            )
        return
    group = None
    for row in rows:
        title = (row["experiment"], row.get("size", row.get("x", row.get("window_mb"))))
        if title != group:
            group = title
            print("\n" + " | ".join(str(x) for x in title))
        skip = ("experiment", "variant", "size", "x", "window_mb")
        figures = "  ".join(
            f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}"
            for k, v in row.items()
            if k not in skip
        )
        print(f"{row['variant'][:64]:64} {figures}")


if __name__ == "__main__":
    main()
