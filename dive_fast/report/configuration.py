"""What the runs are runs of, and in what they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dive_fast.report.parts import NOTHING, Cell, Column, Folded, Section, Table, Text
from dive_fast.report.runs import Run

_LONGEST = 90  # letters of a value
# Of a machine's description: what names the model stands in the first table.
_VERSIONS = ("dive_fast", "commit", "torch", "diffusers", "python", "device")


def section(runs: Sequence[Run]) -> Section:
    """The main settings, those in which the runs differ, and all of them, folded."""
    everything = {key: [flat.get(key) for flat in map(_flat, runs)] for key in _keys(runs)}
    main = _table("The main settings of each run", _main(runs), runs)
    parts: list[object] = [main]
    if len(runs) > 1:
        different = {key: values for key, values in everything.items() if _differ(values)}
        if different:
            parts.append(_table("All settings that differ", different, runs, mark=False))
        else:
            parts.append(Text("The runs have the same settings."))
    whole = _table("Everything that run.json holds", everything, runs)
    parts.append(Folded("All settings", [whole]))
    return Section("configuration", "What was run", parts)


def model_name(run: Run) -> str:
    """The model's own name, or its family."""
    model = run.config.get("model")
    family = model.get("family") if isinstance(model, Mapping) else model
    return str(run.environment.get("model") or family or NOTHING)


def strategy_name(run: Run) -> str:
    strategy = run.config.get("strategy")
    name = strategy.get("name") if isinstance(strategy, Mapping) else strategy
    return str(name or NOTHING)


def _main(runs: Sequence[Run]) -> dict[str, list[Any]]:
    rows = {
        "model": [model_name(run) for run in runs],
        "weights": [_mapping(run.config.get("model")).get("weights") for run in runs],
        "data": [_data(run) for run in runs],
        "strategy": [strategy_name(run) for run in runs],
        "probes": [run.config.get("probes") for run in runs],
        "seed": [run.config.get("seed") for run in runs],
        **{name: [run.environment.get(name) for run in runs] for name in _VERSIONS},
        "directory": [str(run.path) for run in runs],
    }
    return {key: values for key, values in rows.items() if any(v is not None for v in values)}


def _data(run: Run) -> str | None:
    data = run.data
    if "source" not in data:
        return run.where
    fingerprint = f" ({data['fingerprint']})" if data.get("fingerprint") else ""
    return f"{data['source']}, {data.get('count', NOTHING)} images{fingerprint}"


def _table(caption: str, rows: Mapping[str, list], runs: Sequence[Run], mark: bool = True) -> Table:
    columns = [Column("setting", numeric=False)]
    columns += [Column(run.label, numeric=False, series=run.series) for run in runs]
    cells = [
        [
            Cell(key, differs=mark and key != "directory" and _differ(values)),
            *(Cell(_text(value)) for value in values),
        ]
        for key, values in rows.items()
    ]
    return Table(caption, columns, cells, sortable=False)


def _keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in _flat(run)))


def _flat(run: Run) -> dict[str, Any]:
    """The configuration and the environment by their keys in dots."""
    found: dict[str, Any] = {}
    _add(found, "", {k: v for k, v in run.config.items() if k not in ("schema", "names")})
    _add(found, "environment.", run.environment)
    return found


def _add(found: dict[str, Any], prefix: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _add(found, f"{prefix}{key}.", value)
        else:
            found[f"{prefix}{key}"] = value


def _differ(values: Sequence[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True) for value in values}) > 1


def _text(value: object) -> str:
    if value is None:
        return NOTHING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST:
        return text
    start = text[:_LONGEST].rstrip(", ")
    return f"{start} \N{HORIZONTAL ELLIPSIS}" + (
        f" ({len(value)} values)" if isinstance(value, list) else ""
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
