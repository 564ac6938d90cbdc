"""A trained model in the formats of other programs: Hugging Face transformers (hf) and llama.cpp (gguf)."""

import contextlib
import json
import re
from pathlib import Path

import click

from config import CONTEXT_SETTINGS, Command, SampleConfig, UserError, atomic_write, quoted
from data import Tokenizer
from model import NORM_EPS, ROPE_BASE, find_checkpoint, load_checkpoint, save_checkpoint

SAMPLING = SampleConfig()  # an exported model generates with the defaults of chat.py

# Our module: its names in transformers and in llama.cpp. A fused matrix is split among several names.
TENSOR_NAMES = {
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_1": ("input_layernorm", "attn_norm"),
    "attn.c_attn": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_q attn_k attn_v"),
    "attn.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attn.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "attn.c_proj": ("self_attn.o_proj", "attn_output"),
    "ln_2": ("post_attention_layernorm", "ffn_norm"),
    "mlp.c_fc": ("mlp.gate_proj mlp.up_proj", "ffn_gate ffn_up"),
    "mlp.c_proj": ("mlp.down_proj", "ffn_down"),
    "ln_f": ("model.norm", "output_norm"),
    "blocks": ("model.layers", "blk"),
}


def renamed_weights(model, column):
    """Yield (name, float32 tensor) with the names of transformers (column 0) or llama.cpp (column 1)."""
    for name, tensor in model.state_dict().items():
        layer, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        prefix = f"{TENSOR_NAMES['blocks'][column]}.{layer}." if layer else ""
        names = TENSOR_NAMES[module][column].split()
        for new_name, part in zip(names, tensor.float().chunk(len(names)), strict=True):
            yield f"{prefix}{new_name}.{kind}", part


def architecture(config):
    """llama or qwen3, whichever of the two computes what this model computes; UserError if neither does."""
    if config.position == "learned":
        obstacle, remedy = "learned positions", "--preset llama"
    elif config.qk_norm and config.bias:
        obstacle, remedy = "both QK-norm and biases", "--no-bias"
    else:
        return "qwen3" if config.qk_norm else "llama"
    raise UserError(f"this model has {obstacle}, and no architecture of transformers or llama.cpp matches that. Use "
                    f"--format pt, or train a model that can be exported: python train.py {remedy}")


def max_new_tokens(config):
    """Positions past the context were never trained, so a quarter of it is kept for the prompt."""
    return min(SAMPLING.max_new_tokens, config.block_size * 3 // 4)


# -----------------------------------------------------------------------------
# Hugging Face: a folder that AutoModelForCausalLM and AutoTokenizer load

def tokenizer_json(processor):
    """SentencePiece's BPE for the library tokenizers: no space is added in front, but bos is (add_special_tokens)."""
    pieces = {processor.id_to_piece(i): i for i in range(len(processor))}
    unk, bos, eos = list(pieces)[:3]
    scores = {piece: processor.get_score(i) for piece, i in pieces.items() if i > 2 and not processor.is_byte(i)}
    # SentencePiece joins any two pieces that make up a third, best third first.
    merges = [(piece[:i], piece[i:]) for piece in sorted(scores, key=scores.get, reverse=True)
              for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
    single = [dict(SpecialToken=dict(id=bos, type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=piece, single_word=False, lstrip=False, rstrip=False, normalized=False,
                           special=True) for i, piece in enumerate([unk, bos, eos])],
        normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"), pre_tokenizer=None,
        post_processor=dict(type="TemplateProcessing", single=single,
                            pair=single + [dict(Sequence=dict(id="B", type_id=0))],
                            special_tokens={bos: dict(id=bos, ids=[1], tokens=[bos])}),
        decoder=dict(type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="▁"), content=" "),
                                                dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(type="BPE", dropout=None, unk_token=unk, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=pieces, merges=merges))


def hf_json(config, processor):
    """The JSON files by name. Versions 4 and 5 of transformers read different keys for rotary base and dtype."""
    kind = architecture(config)
    unk, bos, eos = (processor.id_to_piece(i) for i in range(3))
    # Padding with </s> would hide the end of every story from fine-tuning.
    special = dict(unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk)
    return {
        "config.json": dict(
            architectures=[f"{kind.capitalize()}ForCausalLM"], model_type=kind,
            vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
            head_dim=config.n_embd // config.n_head, max_position_embeddings=config.block_size, hidden_act="silu",
            attention_bias=config.bias, mlp_bias=config.bias, rms_norm_eps=NORM_EPS, tie_word_embeddings=True,
            rope_theta=ROPE_BASE, rope_parameters=dict(rope_type="default", rope_theta=ROPE_BASE), bos_token_id=1,
            eos_token_id=2, torch_dtype="float32", dtype="float32"),
        "generation_config.json": dict(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=SAMPLING.temperature,
            top_k=SAMPLING.top_k, top_p=SAMPLING.top_p, repetition_penalty=SAMPLING.repetition_penalty,
            max_new_tokens=max_new_tokens(config)),
        "special_tokens_map.json": special,
        "tokenizer.json": tokenizer_json(processor),
        "tokenizer_config.json": special | dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.block_size, add_bos_token=True,
            add_eos_token=False, add_prefix_space=False, legacy=False, clean_up_tokenization_spaces=False,
            split_special_tokens=True,  # a literal "</s>" in a text is text, as in training
            padding_side="left", model_input_names=["input_ids", "attention_mask"]),
    }


def write_hf(output, model, tokenizer):
    from safetensors.torch import save
    contents = {name: json.dumps(values, indent=1).encode()
                for name, values in hf_json(model.config, tokenizer.processor).items()}
    contents["tokenizer.model"] = tokenizer.model_bytes
    contents["model.safetensors"] = save(dict(renamed_weights(model, 0)), dict(format="pt"))
    for name, data in contents.items():
        with atomic_write(output / name) as file:
            file.write(data)
    path = output.as_posix().replace("'", r"\'")
    return ("Try it (pip install transformers):\n  python -c \"from transformers import pipeline; "
            f"print(pipeline('text-generation', '{path}')('Once upon a time')[0]['generated_text'])\"")


# -----------------------------------------------------------------------------
# llama.cpp: one GGUF file

def write_gguf(output, model, tokenizer):
    import gguf
    kind = architecture(model.config)
    config, processor, types = model.config, tokenizer.processor, gguf.TokenType
    ids, head_size = range(config.vocab_size), config.n_embd // config.n_head
    metadata = dict(
        name=output.stem, file_type=gguf.LlamaFileType.ALL_F32, vocab_size=config.vocab_size,
        context_length=config.block_size, embedding_length=config.n_embd, block_count=config.n_layer,
        feed_forward_length=config.intermediate_size, head_count=config.n_head, head_count_kv=config.n_head,
        key_length=head_size, value_length=head_size, rope_dimension_count=head_size, rope_freq_base=ROPE_BASE,
        layer_norm_rms_eps=NORM_EPS,
        tokenizer_model="llama", tokenizer_pre="default",  # llama.cpp's name for SentencePiece BPE
        token_list=[processor.id_to_piece(i) for i in ids], token_scores=[processor.get_score(i) for i in ids],
        token_types=[types.UNKNOWN, types.CONTROL, types.CONTROL,
                     *(types.BYTE if processor.is_byte(i) else types.NORMAL for i in ids[3:])],
        unk_token_id=0, bos_token_id=1, eos_token_id=2, add_bos_token=True, add_eos_token=False, add_space_prefix=False,
        sampling_temp=SAMPLING.temperature, sampling_top_k=SAMPLING.top_k, sampling_top_p=SAMPLING.top_p,
        sampling_min_p=SAMPLING.min_p, sampling_penalty_last_n=SAMPLING.repetition_window,
        sampling_penalty_repeat=SAMPLING.repetition_penalty)
    # The library opens the temporary file again, by its name.
    with atomic_write(output) as file, contextlib.closing(gguf.GGUFWriter(file.name, kind)) as writer:
        for name, value in metadata.items():
            if hasattr(writer, f"add_{name}"):  # sampling_* are new in gguf, and only convenient
                getattr(writer, f"add_{name}")(value)
        for name, tensor in renamed_weights(model, 1):
            # A rotary pair is rows i and i + D/2 of a head for us and llama.cpp's qwen3, 2i and 2i + 1 for its llama.
            if kind == "llama" and re.search(r"attn_[qk]\.", name):
                tensor = tensor.unflatten(0, (config.n_head, 2, -1)).transpose(1, 2).flatten(0, 2)  # (C, ...)
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return ("Try it (llama.cpp; its older versions call the program llama-cli):\n"
            f"  llama-completion -m {quoted(output)} -no-cnv -p \"Once upon a time\" -n {max_new_tokens(config)} "
            f"--temp {SAMPLING.temperature} --top-k {SAMPLING.top_k} --repeat-penalty {SAMPLING.repetition_penalty}")


# -----------------------------------------------------------------------------
# Our own formats, and the command

def write_pt(output, model, tokenizer, **more):
    save_checkpoint(output, model, tokenizer.model_bytes, **more)
    return f"Try it:\n  python chat.py --checkpoint {quoted(output)}"


def write_tokenizer(output, model, tokenizer):
    with atomic_write(output) as file:
        file.write(tokenizer.model_bytes)
    return (f"Prepare text with it:\n  python preprocess.py prepare-dataset --tokenizer {quoted(output)} "
            "--dataset YOUR-TEXT --data-dir data/mine")


WRITERS = {"hf": write_hf, "gguf": write_gguf, "pt": write_pt, "tokenizer": write_tokenizer}


def check_output(output, format, checkpoint_path, overwrite):
    """UserError unless `output` may be written."""
    if output.resolve() == checkpoint_path.resolve():
        problem = "is the checkpoint itself:"
    elif output.exists() and output.is_dir() != (format == "hf"):
        problem = f"is a {'folder' if output.is_dir() else 'file'}, which {format} is not:"
    elif output.exists() and not overwrite:
        problem = "exists: add --overwrite to replace it, or"
    else:
        return
    raise UserError(f"{output} {problem} choose another path with --output.")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--format", type=click.Choice(list(WRITERS)), required=True,
              help="hf: a folder for Hugging Face transformers; gguf: a file for llama.cpp; pt: a checkpoint without "
              "the training state; tokenizer: the SentencePiece model")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="PATH",
              help="folder (hf) or file (the others) to write")
@click.option("--checkpoint", "checkpoint_path", type=click.Path(path_type=Path), metavar="FILE",
              help="model to export  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", default="out", metavar="FOLDER", help="folder of a training run  [default: out]")
@click.option("--overwrite", is_flag=True, help="replace an earlier export")
def main(format, output, checkpoint_path, out_dir, overwrite):
    """Convert a trained model to the format of another program.

    hf and gguf need rotary positions (--preset llama or demo): the model becomes a Llama, with QK-norm a Qwen3.
    """
    checkpoint_path = checkpoint_path or find_checkpoint(out_dir)
    check_output(output, format, checkpoint_path, overwrite)
    model, checkpoint = load_checkpoint(checkpoint_path)
    tokenizer = Tokenizer(checkpoint["tokenizer"], f"the tokenizer in {checkpoint_path}")
    more = dict(word_prompts=True) if format == "pt" and checkpoint.get("word_prompts") else {}  # for chat.py --words
    next_step = WRITERS[format](output, model, tokenizer, **more)
    millions = model.count_parameters() / 1e6
    click.echo(f"Wrote {output} from {checkpoint_path} ({millions:.1f} M parameters).\n{next_step}")


if __name__ == "__main__":
    main()
