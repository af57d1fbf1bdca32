"""The real predictor with faults that a test asks for, by files in the working folder.

`step_fails`: the next decoding step raises a CUDA error. `gpu_is_lost`: so does every synchronisation, as after an
error that leaves the CUDA context unusable. `thread_dies`: the compute thread ends after the next decoding step.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from clipgen.models.gpt import GPT
from predict import Predictor as RealPredictor

ERROR = "CUDA error: an illegal memory access was encountered"


class Predictor(RealPredictor):
    def setup(self) -> None:
        step = GPT.decode_step

        def decode_step(gpt: GPT, *args: Any, **kwargs: Any) -> Any:
            if Path("step_fails").exists():
                Path("step_fails").unlink()
                raise RuntimeError(ERROR)
            if Path("thread_dies").exists():
                Path("thread_dies").unlink()
                self.service.pipe.compute.submit(lambda: time.sleep(0.1)).add_done_callback(lambda _: sys.exit())
            return step(gpt, *args, **kwargs)

        def synchronize(device: object = None) -> None:
            if Path("gpu_is_lost").exists():
                raise RuntimeError(ERROR)

        GPT.decode_step = decode_step  # type: ignore[method-assign]
        torch.cuda.synchronize = synchronize
        super().setup()  # the batch keeps the step that it finds
