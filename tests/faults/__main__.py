"""Runs the cases and counts how they end; see the package."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the small models that the tests use

from tests.faults import child  # noqa: E402
from tests.faults.kinds import KINDS, Inputs  # noqa: E402

GOOD = ("sentence", "right")
OUTCOMES = (*GOOD, "untidy", "traceback", "crash", "hang", "child process")


def main() -> int:
    options = _parse()
    _import()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        inputs = Inputs(Path(temporary) / "good")
        inputs.folder.mkdir()
        _make(inputs, Path(temporary))
        cases = [(kind, i) for i in range(options.cases) for kind in KINDS][: options.cases]
        if options.only:
            kind, number = options.only.split(":")
            cases = [(kind, int(number))]
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        with ThreadPoolExecutor(options.jobs) as pool:
            run = lambda case: _run(inputs, Path(temporary), options.seed, *case)  # noqa: E731
            for (kind, number), (ending, work) in zip(cases, pool.map(run, cases), strict=True):
                counts[kind][ending.outcome] += 1
                if ending.outcome not in GOOD or options.only or options.show:
                    print(
                        f"\n{kind}:{number} {ending.outcome}\n{ending.err.strip()[-2000:]}",
                        flush=True,
                    )
                    if options.only:
                        print(ending.out)
                    if options.keep:
                        shutil.copytree(work, options.keep / f"{kind}-{number}", dirs_exist_ok=True)
                shutil.rmtree(work)
    _print(counts)
    return int(any(counts[kind][outcome] for kind in counts for outcome in OUTCOMES[2:]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case, with all that it says")
    parser.add_argument("--show", action="store_true", help="what every case says")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy what failed there")
    return parser.parse_args()


def _import() -> None:
    """What the forks need, so that each does not load it; nothing is computed here."""
    import diffusers
    import ldm_reference  # noqa: F401
    import pycocotools.cocoeval  # noqa: F401
    import tiny_layout  # noqa: F401
    import tiny_sd  # noqa: F401
    import torch
    import transformers

    import dive_fast.cli.demo
    import dive_fast.evaluation
    import dive_fast.models.layout_to_image.convert
    import dive_fast.predict.classifier
    import dive_fast.predict.detector  # noqa: F401
    from dive_fast.models import gligen, stable_diffusion  # noqa: F401
    from dive_fast.models.dit import model  # noqa: F401
    from dive_fast.models.layout_to_image import load  # noqa: F401

    assert diffusers.DDIMScheduler and transformers.CLIPTextModel
    torch.set_num_threads(1)


def _make(inputs: Inputs, folder: Path) -> None:
    """In a fork as well: torch's threads do not survive one."""
    said = folder / "made"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            inputs.make()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"the good inputs could not be made:\n{said.read_text()}")


def _run(
    inputs: Inputs, folder: Path, seed: int, kind: str, number: int
) -> tuple[child.Ending, Path]:
    work = folder / f"{kind}-{number}"
    work.mkdir()
    rng = random.Random(f"{seed} {kind} {number}")
    return child.run(lambda: KINDS[kind](inputs, work, rng), work), work


def _print(counts: dict[str, Counter[str]]) -> None:
    print("\n" + f"{'':12}" + "".join(f"{outcome:>15}" for outcome in OUTCOMES))
    for kind, found in counts.items():
        print(f"{kind:12}" + "".join(f"{found[outcome]:15d}" for outcome in OUTCOMES))
    total = sum(counts.values(), Counter())
    print(f"{'all':12}" + "".join(f"{total[outcome]:15d}" for outcome in OUTCOMES))


if __name__ == "__main__":
    sys.exit(main())
