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

# Our modules and their names in transformers, which the library gguf translates. A fused matrix is split.
MODULE_NAMES = {
    "wte": "model.embed_tokens",
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.gate_proj mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_f": "model.norm",
}


def renamed_weights(model):
    """Yield (name in transformers, float32 tensor)."""
    for name, tensor in model.state_dict().items():
        layer, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        prefix = f"model.layers.{layer}." if layer else ""
        names = MODULE_NAMES[module].split()
        for new_name, part in zip(names, tensor.float().chunk(len(names)), strict=True):
            yield f"{prefix}{new_name}.{kind}", part


def architecture(config):
    """llama or qwen3, whichever computes the same as this model; UserError if neither does."""
    if config.position == "learned":
        obstacle, remedy = "learned positions", "--preset llama"
    elif config.qk_norm and config.bias:
        obstacle, remedy = "both QK-norm and biases", "--no-bias"
    else:
        return "qwen3" if config.qk_norm else "llama"
    raise UserError(f"transformers and llama.cpp have no architecture with {obstacle}. Use --format pt, or train "
                    f"again: python train.py {remedy}")


def max_new_tokens(config):
    """A quarter of the context is kept for the prompt: positions past it were never trained."""
    return min(SAMPLING.max_new_tokens, config.block_size * 3 // 4)


# -----------------------------------------------------------------------------
# Hugging Face: a folder that AutoModelForCausalLM and AutoTokenizer load

def tokenizer_json(processor):
    """SentencePiece's BPE for the library tokenizers, which adds bos in front, but no space."""
    pieces = {processor.id_to_piece(i): i for i in range(len(processor))}
    unk, bos, eos = list(pieces)[:3]
    scores = {piece: processor.get_score(i) for piece, i in pieces.items() if i > 2 and not processor.is_byte(i)}
    # SentencePiece joins any two pieces that make up a third, best third first.
    merges = [(piece[:i], piece[i:]) for piece in sorted(scores, key=scores.get, reverse=True)
              for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
    single = [dict(SpecialToken=dict(id=bos, type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    return dict(
        version="1.0", pre_tokenizer=None,
        added_tokens=[dict(id=i, content=piece, single_word=False, lstrip=False, rstrip=False, normalized=False,
                           special=True) for i, piece in enumerate([unk, bos, eos])],
        normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"),
        post_processor=dict(type="TemplateProcessing", single=single,
                            pair=single + [dict(Sequence=dict(id="B", type_id=0))],
                            special_tokens={bos: dict(id=bos, ids=[1], tokens=[bos])}),
        decoder=dict(type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="▁"), content=" "),
                                                dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(type="BPE", unk_token=unk, fuse_unk=True, byte_fallback=True, vocab=pieces, merges=merges))


def write_hf(output, model, tokenizer):
    from safetensors.torch import save
    config, kind = model.config, architecture(model.config)
    unk, bos, eos = (tokenizer.processor.id_to_piece(i) for i in range(3))
    files = {  # the keys of transformers 4, which version 5 reads too
        "config.json": dict(
            architectures=[f"{kind.capitalize()}ForCausalLM"], model_type=kind,
            vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
            head_dim=config.n_embd // config.n_head, max_position_embeddings=config.block_size, rope_theta=ROPE_BASE,
            hidden_act="silu", attention_bias=config.bias, mlp_bias=config.bias, rms_norm_eps=NORM_EPS,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, torch_dtype="float32"),
        "generation_config.json": dict(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=SAMPLING.temperature,
            top_k=SAMPLING.top_k, top_p=SAMPLING.top_p, repetition_penalty=SAMPLING.repetition_penalty,
            max_new_tokens=max_new_tokens(config)),
        "tokenizer.json": tokenizer_json(tokenizer.processor),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", unk_token=unk, bos_token=bos, eos_token=eos,
            pad_token=unk,  # </s> would hide the end of every story from fine-tuning
            model_max_length=config.block_size, add_bos_token=True, add_prefix_space=False, legacy=False,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,  # a literal "</s>" in a text is text, as in training
            padding_side="left", model_input_names=["input_ids", "attention_mask"]),
    }
    contents = {name: json.dumps(values, indent=1).encode() for name, values in files.items()}
    contents["tokenizer.model"] = tokenizer.model_bytes
    contents["model.safetensors"] = save(dict(renamed_weights(model)), dict(format="pt"))
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
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.n_layer)
        for name, tensor in renamed_weights(model):
            # A rotary pair is rows i and i + D/2 of a head for us and llama.cpp's qwen3, 2i and 2i + 1 for its llama.
            if kind == "llama" and re.search("[qk]_proj", name):
                tensor = tensor.unflatten(0, (config.n_head, 2, -1)).transpose(1, 2).flatten(0, 2)  # (C, ...)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return ("Try it (with an older llama.cpp: llama-cli):\n"
            f"  llama-completion -m {quoted(output)} -no-cnv -p \"Once upon a time\" -n {max_new_tokens(config)}")


def write_pt(output, model, tokenizer, **more):
    save_checkpoint(output, model, tokenizer.model_bytes, **more)
    return f"Try it:\n  python chat.py --checkpoint {quoted(output)}"


def write_tokenizer(output, model, tokenizer):
    with atomic_write(output) as file:
        file.write(tokenizer.model_bytes)
    return (f"Prepare text with it:\n  python preprocess.py prepare-dataset --tokenizer {quoted(output)} "
            "--dataset YOUR-TEXT --data-dir data/mine")


WRITERS = {"hf": write_hf, "gguf": write_gguf, "pt": write_pt, "tokenizer": write_tokenizer}


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--format", type=click.Choice(list(WRITERS)), required=True,
              help="hf: a folder for Hugging Face transformers; gguf: a file for llama.cpp; pt: a checkpoint without "
              "the training state; tokenizer: the SentencePiece model")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="PATH",
              help="folder (hf) or file to write")
@click.option("--checkpoint", "checkpoint_path", type=click.Path(path_type=Path), metavar="FILE",
              help="model to export  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", default="out", metavar="FOLDER", help="folder of the run  [default: out]")
@click.option("--overwrite", is_flag=True, help="replace an earlier export")
def main(format, output, checkpoint_path, out_dir, overwrite):
    """Convert a trained model to the format of another program.

    hf and gguf need rotary positions (--preset llama or demo): the model becomes a Llama, with QK-norm a Qwen3.
    """
    checkpoint_path = checkpoint_path or find_checkpoint(out_dir)
    if output.resolve() == checkpoint_path.resolve():
        raise UserError(f"{output} is the checkpoint itself: choose another --output.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: add --overwrite to replace it, or choose another --output.")
    model, checkpoint = load_checkpoint(checkpoint_path)
    tokenizer = Tokenizer(checkpoint["tokenizer"], f"the tokenizer in {checkpoint_path}")
    more = dict(word_prompts=True) if format == "pt" and checkpoint.get("word_prompts") else {}  # for chat.py --words
    next_step = WRITERS[format](output, model, tokenizer, **more)
    millions = model.count_parameters() / 1e6
    click.echo(f"Wrote {output} from {checkpoint_path} ({millions:.1f} M parameters).\n{next_step}")


if __name__ == "__main__":
    main()
