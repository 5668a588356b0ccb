"""`python -m fusedalign.bench.training JOB FILE`: measure the job (a `Job` in JSON), write a `Measured` in JSON."""

import dataclasses
import json
import os
import sys
from pathlib import Path

from fusedalign.bench.training.settings import Job
from fusedalign.bench.training.worker import measure
from fusedalign.reports import replace_text

if __name__ == "__main__":
    job, path = sys.argv[1:]
    measured = measure(Job(**json.loads(job)))
    if os.environ.get("RANK", "0") == "0":
        replace_text(Path(path), json.dumps(dataclasses.asdict(measured)))
