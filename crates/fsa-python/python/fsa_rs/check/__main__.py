"""The command ``python -m fsa_rs.check``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from . import machine
from .cases import Finding, Setting, run
from .machine import Machine

#: Heads, dimension and block size: of any kind, and as a large model has them.
SMALL, LARGE = ((6, 2), 64, 32), ((5, 1), 128, 64)


def settings(device: str, found: Machine) -> Iterator[Setting]:
    """What is compared on a device. NumPy's arrays have no gradients; PyTorch's tensors have, and so take most time."""
    if device == "cuda":
        for dtype, sizes in (("bfloat16", SMALL), ("bfloat16", LARGE), ("float16", SMALL)):
            yield Setting("torch", device, dtype, *sizes)
        return
    kinds = ["numpy"] if found.versions["torch"] is None else ["numpy", "torch"]
    for arrays in kinds:
        for dtype, sizes in (("float32", SMALL), ("float32", LARGE), ("float16", SMALL), ("bfloat16", SMALL)):
            if arrays == "torch" or dtype != "bfloat16" or machine.has_ml_dtypes():
                yield Setting(arrays, device, dtype, *sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if everything agrees."""
    parser = argparse.ArgumentParser(
        prog="python -m fsa_rs.check",
        description="Proves an installation: computes small cases and compares them with definitions in float64.",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="only this one; without it the CPU, and the GPU where there is one"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(arguments)
    found = machine.look()

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    for name, version in found.versions.items():
        say(f"{name}: {version or 'none'}")
    say(f"gpu: {found.gpu or 'none'}")

    problems = [found.without_cuda] if options.device == "cuda" and found.without_cuda else []
    devices = [] if problems else ["cpu", "cuda"] if options.device is None else [options.device]
    findings = []
    for device in devices:
        if device == "cuda" and found.without_cuda:
            say(f"skipped device cuda: {found.without_cuda}")
            continue
        for setting in settings(device, found):
            for finding in run(setting):
                findings.append(finding)
                say(line(finding))
    for problem in problems:
        say(f"FAILED  device cuda: {problem}")

    counts = Counter(finding.status for finding in findings)
    good = not problems and not counts["failed"] and counts["ok"] > 0
    verdict = "fsa_rs works on this machine" if good else "fsa_rs does NOT work as it should on this machine"
    say(f"{counts['ok']} ok, {counts['failed'] + len(problems)} failed, {counts['skipped']} skipped: {verdict}")
    if options.json:
        print(json.dumps(report(found, findings, problems, counts, good), indent=2))
    return 0 if good else 1


def line(finding: Finding) -> str:
    """``ok      window_attn_varlen_func lse (torch, cpu, float32, 6:2x64): error 1.4e-07, allowed 1.0e-04``"""
    status = "FAILED" if finding.status == "failed" else finding.status
    about = f"{finding.arrays}, {finding.device}, {finding.dtype}, {finding.heads}"
    result = finding.message or f"error {finding.error:.1e}, allowed {finding.allowed:.1e}"
    return f"{status:7} {finding.function} {finding.what} ({about}): {result}"


def report(found: Machine, findings: list[Finding], problems: list[str], counts: Counter[str], good: bool) -> object:
    """What ``--json`` prints. JSON has no infinity: such an error is ``null``, and failed."""
    checks = [asdict(finding) for finding in findings]
    for check in checks:
        if check["error"] is not None and not check["error"] < float("inf"):
            check.update(error=None, message="not finite, or other elements than the definition's are")
    return {
        "ok": good,
        "versions": found.versions,
        "gpu": found.gpu,
        "without_cuda": found.without_cuda,
        "problems": problems,
        "counts": {status: counts[status] for status in ("ok", "failed", "skipped")},
        "checks": checks,
    }


if __name__ == "__main__":
    sys.exit(main())
