"""``dive-fast info``: what is installed, and which ops are native."""

from __future__ import annotations

import argparse
import json
import platform


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, devices, native ops",
        description="Versions, devices, and which ops run compiled code (or why they do not). "
        "With --fitted what was fitted to a model.",
    )
    parser.add_argument(
        "--fitted",
        metavar="DIR",
        help="instead what dive_fast.json of a model, or of 'dive-fast fit --out', says",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def collect() -> dict:
    import diffusers
    import torch

    import dive_fast
    from dive_fast import ops, zoo
    from dive_fast.strategies import preset_names, strategy_names

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "dive_fast": dive_fast.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "devices": {
            "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "cuda": cuda,
        },
        "ops": {
            name: {"native": status.native, "reason": status.reason}
            for name, status in ops.native_status().items()
        },
        "models": list(zoo.names()),
        "strategies": list(strategy_names()),
        "presets": list(preset_names()),
    }


def fitted_text(directory: str) -> str:
    """What was fitted to a model, one thing after the other.

    Raises:
        ModelError: there is no ``dive_fast.json``, or it is damaged.
    """
    from pathlib import Path

    from dive_fast.cli.fit import as_text, shortlist_text
    from dive_fast.models.files.sidecar import read_fitted

    found = read_fitted(Path(directory), required=True)
    beta = "not fitted" if found.inverse_temperature is None else f"{found.inverse_temperature:g}"
    parts = [f"beta (weights uniform): {beta}"]
    parts.append(f"weights: {found.loss_weights or 'uniform'}")
    parts.append(as_text(found.timesteps) if found.timesteps else "probes at even timesteps")
    parts.append(shortlist_text(found.shortlist) if found.shortlist else "no shortlist")
    if (rule := found.detection) is not None:
        said = {
            "probes": None if rule.probes is None else str(rule.probes),
            "margin": None if rule.margin is None else f"{rule.margin:.2%}",
            "weight of the prior": None if rule.prior_weight is None else f"{rule.prior_weight:g}",
            "margin in the end": None if rule.final_margin is None else f"{rule.final_margin:.2%}",
            "windows of": rule.sizes and " and ".join(f"{w:.0%} x {h:.0%}" for w, h in rule.sizes),
        }
        fitted = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        parts.append(f"search for objects: {fitted or 'nothing fitted'}")
    return "\n\n".join(parts)


def fitted_values(directory: str) -> dict:
    """The same for JSON."""
    from pathlib import Path

    from dive_fast.models.files.sidecar import fitted_entries, read_fitted

    return fitted_entries(read_fitted(Path(directory), required=True))


def run(options: argparse.Namespace) -> int:
    if options.fitted is not None:
        show = fitted_values if options.json else fitted_text
        said = show(options.fitted)
        print(json.dumps(said, indent=2) if options.json else said)
        return 0
    found = collect()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, version in found["versions"].items():
        print(f"{name:12} {version}")
    print(f"{'cpu':12} {found['devices']['cpu']}")
    print(f"{'cuda':12} {', '.join(found['devices']['cuda']) or 'none'}")
    for part in ("models", "strategies", "presets"):
        print(f"{part:12} {', '.join(found[part])}")
    print("ops")
    for name, status in found["ops"].items():
        kind = "native" if status["native"] else "reference"
        print(f"  {name:28} {kind:10} {status['reason']}")
    return 0
