"""Stage `pad`: pads the demo's models to 3.6 B parameters, in /tmp/padded. They compute the same at a real cost."""

import sys

from common import MODELS, PADDED, ROOT, SCALE, say

sys.path.append(str(ROOT / "deploy" / "bench"))

from padding import Shape, ensure_padded

LARGE = {
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 12288,
}


def run() -> None:
    ensure_padded(MODELS, PADDED, Shape() if SCALE > 1 else Shape(**LARGE))
    size = sum(file.stat().st_size for file in (PADDED / "policy").glob("*.safetensors"))
    say("padded,", size // 2**20, "MiB")
