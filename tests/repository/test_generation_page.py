"""The script of `docs/generation.md` runs unchanged: two processes print the text of one."""

import json
import re

from transformers import PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer
from tests.hf.models import llama
from tests.support.harness import ROOT, launch_forked

DRIVER = """
import json, sys
import torch
settings = json.load(open(sys.argv[1]))
texts = []
exec(settings["script"], settings["names"] | {"print_text": texts.append})
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
open(f"{sys.argv[2]}.{rank}", "w").write(json.dumps(texts))
"""


def test_the_documented_script_prints_the_text_of_one_process(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), flags=re.DOTALL)
    model = tmp_path / "model"
    llama("sdpa", vocab_size=512, initializer_range=0.5).save_pretrained(model)
    PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer()).save_pretrained(model)
    (tmp_path / "driver.py").write_text(DRIVER)
    names = {"name": str(model), "text": "Call me Ishmael. Some years ago, never mind how long. " * 3, "new_tokens": 8}
    for size in (1, 2):
        settings = {"script": script, "names": names | {"size": size}}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        launch_forked([str(tmp_path / "driver.py"), str(tmp_path / "settings.json"), str(tmp_path / f"{size}")], size)
    results = [json.loads((tmp_path / name).read_text()) for name in ("1.0", "2.0", "2.1")]
    assert results[0] == results[1] == results[2] and len(results[0][0]) > 0
