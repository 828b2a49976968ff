"""Holds fsa_rs against the public implementations, on one GPU, in one process.

    python bench/compare.py --fsa PATH --sfnsa PATH --record bench/records/h200/DATE-selected.json
    python bench/compare.py --what nsa --fsa PATH --sfnsa PATH --record bench/records/h200/DATE-nsa.json
    python bench/compare.py --what module --fsa PATH

PATHs are checkouts of Relaxed-System-Lab/Flash-Sparse-Attention and mdy666/Scalable-Flash-Native-Sparse-Attention.
`selected` measures selected attention, `nsa` the whole operation and its stages, and `module` compares our layer with
FSA's of the same weights. Every shape is checked before it is timed: our results against sampled rows in f64, and
against the peers'. Everything is saved as it comes. Exit code 1: a result of ours is wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path

import torch

from comparison import module, nsa, selected, tables
from comparison import peer_stages as stages
from comparison import peers as public
from comparison import record as records

#: What the row under way at the deadline may take.
GRACE_S = 60


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("selected", "nsa", "module"), default="selected", help="default: selected")
    parser.add_argument("--fsa", type=Path, help="checkout of Flash-Sparse-Attention; has the scorer, too")
    parser.add_argument("--sfnsa", type=Path, help="checkout of Scalable-Flash-Native-Sparse-Attention")
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help="parts of `selected` or `nsa`; default: all")
    parser.add_argument("--record", type=Path, help="JSON file to write; a text of the same stem goes beside it")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what would take longer is left out")
    parser.add_argument("--commit", default=os.environ.get("FSA_COMMIT", "unknown"), help="commit of fsa_rs")
    options = parser.parse_args()
    known = {"selected": list(selected.SECTIONS), "nsa": list(nsa.SECTIONS), "module": []}[options.what]
    options.sections = options.sections or known
    if unknown := set(options.sections) - set(known):
        parser.error(f"--sections: expected some of {' '.join(known) or 'none'}, got {' '.join(sorted(unknown))}")
    if options.what == "module" and options.fsa is None:
        parser.error("--what module: needs --fsa")
    return options


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("compare.py needs a GPU")
        return 2
    deadline = time.monotonic() + options.budget
    if options.what != "module":  # which has no deadline
        # A kernel that never ends must not look like a slow one: says where, and leaves what was saved.
        faulthandler.dump_traceback_later(options.budget + GRACE_S, exit=True)
    peers, commits = public.load(options.fsa, options.sfnsa)
    about = records.about(options.commit, commits)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    record = records.Record(options.record, about, tables.selected if options.what == "selected" else tables.nsa)
    if options.what == "selected":
        selected.Comparison(peers, record, deadline).sections(options.sections, options.fsa is not None)
    elif options.what == "nsa":
        wholes: list[stages.Peer] = [stages.Fsa()] if options.fsa else []
        wholes += [stages.Sfnsa()] if options.sfnsa else []
        nsa.Comparison(wholes, record, deadline).sections(options.sections)
    else:
        module.compare(record)
    print(record.summary(record.rows))
    record.note(f"{record.failures} failures")
    return int(record.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
