"""Generate the images of the examples in docs/model-page.md through the server, and write them beside it.

    python benchmarks/model_page.py [--weights weights/mini]

Each example is a heading and a JSON block: the inputs of one prediction. An image among them is named by its path
relative to docs/; here it is sent as a data: URL.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib import request as http

from end_to_end import ROOT
from serving import serve

from clipgen.errors import UnavailableError
from clipgen.utils.entry_point import entry_point

PAGE = ROOT / "docs" / "model-page.md"
IMAGES = PAGE.with_suffix("")


def read_examples(page: Path) -> dict[str, dict[str, Any]]:
    """Inputs of each example, by the name of its image files: the heading in lower case, with dashes."""
    found = re.findall(r"^### (.*?)$[^#]*?^```json\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return {heading.lower().replace(" ", "-"): json.loads(block) for heading, block in found}


def to_request(inputs: dict[str, Any], folder: Path) -> bytes:
    """Body of a prediction request, with a data: URL in place of an image's path."""
    inputs = inputs | {"output_format": "webp"}
    if "image" in inputs:
        data = base64.b64encode((folder / inputs["image"]).read_bytes()).decode()
        inputs["image"] = f"data:image/webp;base64,{data}"
    return json.dumps({"input": inputs}).encode()


def predict(address: str, body: bytes) -> list[bytes]:
    """Output files of one prediction.

    Raises:
        UnavailableError: the prediction failed.
    """
    with http.urlopen(http.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})) as reply:
        answer = json.load(reply)
    if answer["status"] != "succeeded":
        raise UnavailableError(answer["error"])
    return [base64.b64decode(url.partition(",")[2]) for url in answer["output"]]


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with serve(args.weights) as address:
        for name, inputs in read_examples(PAGE).items():
            for i, data in enumerate(predict(address, to_request(inputs, PAGE.parent)), start=1):
                (IMAGES / f"{name}-{i}.webp").write_bytes(data)
                print(IMAGES / f"{name}-{i}.webp")


if __name__ == "__main__":
    main()
