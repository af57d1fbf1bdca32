"""`python -m clipgen doctor`: whether everything is as it should be, in plain words."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from clipgen.cli import common as t
from clipgen.cli.common import FILES, option

EXAMPLE = "Example: python -m clipgen doctor --weights weights/mini"
_SIGNS = {"ok": "ok", "warning": "note", "wrong": "WRONG"}


def doctor(
    weights: t.Weights = t.MINI,
    device: t.Device = None,
    dtype: t.Dtype = None,
    as_json: Annotated[bool, option(FILES, "Print one JSON object: ok, and the findings.", "--json")] = False,
) -> None:
    """Check the installation, the machine and the weights, and draw a picture.

    Exit code 0: it works, whatever is noted; 1: something is wrong.
    """
    from clipgen.cli.examine import examine

    findings = []
    for finding in examine(weights, device, dtype):
        findings.append(finding)
        if not as_json:
            print(f"{_SIGNS[finding.state]:>5}  {finding.name:9}{t.printable(finding.text)}", flush=True)
    wrong = sum(finding.state == "wrong" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}))
    else:
        print(f"{wrong} wrong" if wrong else "everything works")
    raise typer.Exit(1 if wrong else 0)
