#!/usr/bin/env python3
"""Makes a Llama of 503 million random weights for compare.sh, as safetensors and as GGUF, in float32 and bfloat16.

    python scripts/llama-cpp/make-model.py FOLDER      needs torch, transformers and gguf; 5 GB of disk
"""
import pathlib
import sys

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter

LAYERS, HEADS, KV_HEADS, HIDDEN, INTERMEDIATE, VOCABULARY, THETA = 8, 32, 8, 2048, 8192, 4096, 500000.0

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
OF_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def interleaved(weight, heads):
    """GGUF's Llama rotates neighbouring dimensions, and checkpoints the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, weights, bfloat16):
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    names = dict(NAMES)
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{short}" for name, short in OF_LAYER.items()}
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        short = names[name.removesuffix(".weight")] + ".weight"
        if bfloat16 and weight.dim() == 2:
            raw = weight.contiguous().to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(short, raw.reshape(weight.shape[0], -1), raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(short, weight.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY, tie_word_embeddings=False, rope_theta=THETA,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    model = model.float()
    model.config.dtype = "float32"
    model.save_pretrained(folder / "f32")
    for kind in ("f32", "bf16"):
        write_gguf(folder / f"{kind}.gguf", model.state_dict(), kind == "bf16")


main()
