"""The page of training loops: the script for accelerate in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.trainer.test_loops import IDS, SCRIPTS

ALSO = """
import torch
with torch.no_grad():
    logits = accelerator.unwrap_model(model).eval()(input_ids=torch.arange(5, 45).view(2, 20)).logits
torch.save(logits, f"{out}-{accelerator.process_index}.pt")
"""


def test_two_processes_train_one_adapter(tiny_base: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "loop.py", tmp_path / "lora"
    script.write_text(SCRIPTS["Several processes, with accelerate"] + ALSO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*launch, str(script), str(tiny_base), str(out)], env=environment, check=True, timeout=250)
    first, second = (torch.load(f"{out}-{number}.pt", weights_only=True) for number in (0, 1))
    assert torch.equal(first, second)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        loaded = PeftModel.from_pretrained(base, out)(input_ids=IDS).logits
    torch.testing.assert_close(loaded, first, rtol=1e-4, atol=1e-4)
    assert (first - before).abs().max() > 1e-3
