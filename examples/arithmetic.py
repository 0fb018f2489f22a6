"""Writes a toy task whose best weights are known: addition, in five sources with 0 to 100% wrong answers.

    python examples/arithmetic.py OUT_DIR [--seed 1]

writes train/{clean,wrong_025,wrong_050,wrong_075,wrong_100}.jsonl with 2,000 records each, and val.jsonl and test.jsonl
with 1,000 clean ones. A record is {"prompt": "07+35=", "response": "42"}; a wrong response is uniform in 00 to 99.
The same seed gives the same bytes. Files that are there already are left alone; where one differs, nothing is written.
"""

import argparse
import json
import random
import sys
from pathlib import Path

SOURCES = {"clean": 0.0, "wrong_025": 0.25, "wrong_050": 0.5, "wrong_075": 0.75, "wrong_100": 1.0}


def make_records(num_records: int, wrong_share: float, seed: str) -> str:
    """JSON Lines of `num_records` additions, of which exactly `wrong_share` have a response drawn at random."""
    draw = random.Random(seed)
    num_wrong = round(num_records * wrong_share)
    is_wrong = [index < num_wrong for index in range(num_records)]
    draw.shuffle(is_wrong)
    lines = []
    for wrong in is_wrong:
        a, b = draw.randrange(50), draw.randrange(50)
        response = draw.randrange(100) if wrong else a + b
        lines.append(json.dumps({"prompt": f"{a:02d}+{b:02d}=", "response": f"{response:02d}"}) + "\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    files = {f"train/{name}.jsonl": (2000, share) for name, share in SOURCES.items()}
    files |= {"val.jsonl": (1000, 0.0), "test.jsonl": (1000, 0.0)}
    contents = {
        arguments.out_dir / name: make_records(num_records, share, f"{arguments.seed}/{name}").encode()
        for name, (num_records, share) in files.items()
    }
    present = {path for path in contents if path.exists()}
    different = [path for path in present if not path.is_file() or path.read_bytes() != contents[path]]
    if different:
        names = ", ".join(sorted(map(str, different)))
        print(f"not overwritten, since the content differs: {names}; give another OUT_DIR or --seed", file=sys.stderr)
        return 2
    for path in contents.keys() - present:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(contents[path])
        part.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
