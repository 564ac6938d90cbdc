"""A trained model for other programs: Hugging Face transformers (hf), llama.cpp (gguf), or its weights alone (pt)."""

import contextlib
import importlib
import json
import os
import shutil
from pathlib import Path

import click

from config import COMMAND_LINE, GroupedCommand, SampleConfig, UserError, cannot_write, replace_file, replacing
from model import NORM_EPS, ROPE_BASE, build_model, read_checkpoint, save_checkpoint
from preprocess import Tokenizer

HF_FILES = ("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json")

# Our module: its names in transformers and in llama.cpp. {} is the layer.
NAMES = {
    "wte": ("model.embed_tokens", "token_embd"),
    "ln_1": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "attn.q": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "attn.k": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "attn.v": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "attn.q_norm": ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    "attn.k_norm": ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    "attn.c_proj": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "ln_2": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "mlp.gate": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "mlp.up": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "mlp.c_proj": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    "ln_f": ("model.norm", "output_norm"),
}
FUSED = {"attn.c_attn": ("attn.q", "attn.k", "attn.v"), "mlp.c_fc": ("mlp.gate", "mlp.up")}


def architecture(config, where):
    """'llama' or 'qwen3', the stock architecture that computes what this model computes; UserError if there is none."""
    if config.position == "learned":
        raise UserError(f"{where} has learned positions, and no stock class of transformers or llama.cpp holds them "
                        "together with RMSNorm and SwiGLU. A rotary model can be exported: train one with "
                        "`python train.py --preset llama`. For this one there is --format pt.")
    if config.qk_norm and config.bias:
        raise UserError(f"{where} has both qk_norm and bias, and no stock class of transformers or llama.cpp holds "
                        "the two together: train with --no-bias, or use --format pt.")
    return "qwen3" if config.qk_norm else "llama"


def split_weights(model):
    """Yield (module, layer, "weight" or "bias", tensor) for each name in NAMES: fused matrices in their parts."""
    for name, tensor in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        layer = None
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
        modules = FUSED.get(module, (module,))
        for module, part in zip(modules, tensor.float().chunk(len(modules)), strict=True):
            yield module, layer, kind, part


def read_tokenizer(model_bytes, vocab_size, where):
    """The SentencePiece processor, once it is sure that exports can rely on its ids."""
    tokenizer = Tokenizer(model_bytes, f"the tokenizer in {where}")
    ids, processor = (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id), tokenizer.processor
    if ids != (0, 1, 2) or len(processor) != vocab_size or not processor.is_byte(processor.piece_to_id("<0x0A>")):
        raise UserError(f"{where}: its tokenizer has {len(processor)} tokens (the model {vocab_size}) and the ids "
                        f"{ids} for unknown, begin and end; it was not made by `python preprocess.py`.")
    return processor


# Hugging Face: a folder that AutoModelForCausalLM and AutoTokenizer load.

def hf_config(config, kind):
    """config.json. Versions 4 and 5 of transformers read different keys for the rotary base and the dtype."""
    return dict(
        architectures=["Qwen3ForCausalLM" if kind == "qwen3" else "LlamaForCausalLM"], model_type=kind,
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
        head_dim=config.n_embd // config.n_head, max_position_embeddings=config.block_size, hidden_act="silu",
        rms_norm_eps=NORM_EPS, rope_theta=ROPE_BASE, rope_parameters=dict(rope_type="default", rope_theta=ROPE_BASE),
        attention_bias=config.bias, mlp_bias=config.bias, attention_dropout=0.0, tie_word_embeddings=True,
        initializer_range=0.02, use_cache=True, bos_token_id=1, eos_token_id=2, torch_dtype="float32", dtype="float32")


def generation_config(config):
    """The defaults of chat.py, short enough for a prompt before: positions past the context were never trained."""
    sample = SampleConfig()
    return dict(bos_token_id=1, eos_token_id=2, pad_token_id=2, do_sample=True, temperature=sample.temperature,
                top_k=sample.top_k, top_p=sample.top_p, repetition_penalty=sample.repetition_penalty,
                max_new_tokens=min(sample.max_new_tokens, config.block_size * 3 // 4))


def merges(tokenizer):
    """The pairs (left, right) that SentencePiece may join: every way to cut each piece, the best piece first."""
    scores = {tokenizer.id_to_piece(i): tokenizer.get_score(i) for i in range(len(tokenizer))
              if not (tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_byte(i))}
    return [(piece[:i], piece[i:]) for piece in sorted(scores, key=scores.get, reverse=True)
            for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]


def tokenizer_json(tokenizer):
    """tokenizer.json: SentencePiece's pieces and merges, no space added, bos in front (add_special_tokens)."""
    special = [tokenizer.id_to_piece(i) for i in range(3)]
    bos, first, second = dict(id=special[1], type_id=0), dict(id="A", type_id=0), dict(id="B", type_id=0)
    single = [dict(SpecialToken=bos), dict(Sequence=first)]
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=piece, single_word=False, lstrip=False, rstrip=False, normalized=False,
                           special=True) for i, piece in enumerate(special)],
        normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"), pre_tokenizer=None,
        post_processor=dict(type="TemplateProcessing", single=single, pair=single + [dict(Sequence=second)],
                            special_tokens={special[1]: dict(id=special[1], ids=[1], tokens=[special[1]])}),
        decoder=dict(type="Sequence", decoders=[dict(type="Replace", pattern=dict(String="▁"), content=" "),
                                                dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(type="BPE", dropout=None, unk_token=special[0], continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=True, byte_fallback=True, ignore_merges=False,
                   vocab={tokenizer.id_to_piece(i): i for i in range(len(tokenizer))}, merges=merges(tokenizer)))


def special_tokens(tokenizer):
    return {f"{name}_token": tokenizer.id_to_piece(i) for i, name in enumerate(["unk", "bos", "eos"])}


def tokenizer_config(tokenizer, config):
    """tokenizer_config.json. A literal "</s>" in a text is text, as in training: split_special_tokens."""
    return special_tokens(tokenizer) | dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.block_size, add_bos_token=True,
        add_eos_token=False, add_prefix_space=False, legacy=False, clean_up_tokenization_spaces=False,
        split_special_tokens=True, padding_side="left")


def write_hf(output, contents, model, tokenizer, where):
    config, kind = model.config, architecture(model.config, where)
    safetensors, save_file = optional("safetensors", "hf"), optional("safetensors.torch", "hf").save_file
    files = {"config.json": hf_config(config, kind), "generation_config.json": generation_config(config),
             "special_tokens_map.json": special_tokens(tokenizer), "tokenizer.json": tokenizer_json(tokenizer),
             "tokenizer_config.json": tokenizer_config(tokenizer, config)}
    with staged(output) as folder:
        folder.mkdir()
        for name, values in files.items():
            with replacing(folder / name, "w") as file:
                json.dump(values, file, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        with replacing(folder / "tokenizer.model") as file:
            file.write(contents["tokenizer"])
        weights = {f"{NAMES[module][0].format(layer)}.{name}": part
                   for module, layer, name, part in split_weights(model)}
        try:
            save_file(weights, folder / "model.safetensors", dict(format="pt"))
        except safetensors.SafetensorError as error:  # a full disk, mostly
            raise OSError(error) from error
    return files["config.json"]["architectures"][0], (
        "Try it (pip install transformers):\n"
        "  python -c \"from transformers import pipeline; "
        f"print(pipeline('text-generation', {output.as_posix()!r})('Once upon a time')[0]['generated_text'])\"")


# llama.cpp: one GGUF file.

def interleave(rows, n_head):
    """Rotary pairs, rows i and i + D/2 of each head in rows (C, ...), moved to 2i and 2i + 1: llama.cpp's for Llama."""
    heads = rows.view(n_head, 2, -1, *rows.shape[1:])  # (H, 2, D/2, ...)
    return heads.transpose(1, 2).reshape(rows.shape)


def token_type(tokenizer, i, types):
    return (types.UNKNOWN if tokenizer.is_unknown(i) else types.CONTROL if tokenizer.is_control(i) else
            types.BYTE if tokenizer.is_byte(i) else types.NORMAL)


def write_gguf(output, contents, model, tokenizer, where):
    config, kind = model.config, architecture(model.config, where)
    gguf = optional("gguf", "gguf")
    ids, head_size = range(len(tokenizer)), config.n_embd // config.n_head
    facts = dict(
        name=output.stem, file_type=gguf.LlamaFileType.ALL_F32, vocab_size=config.vocab_size,
        context_length=config.block_size, embedding_length=config.n_embd, block_count=config.n_layer,
        feed_forward_length=config.intermediate_size, head_count=config.n_head, head_count_kv=config.n_head,
        key_length=head_size, value_length=head_size, rope_dimension_count=head_size, rope_freq_base=ROPE_BASE,
        layer_norm_rms_eps=NORM_EPS,
        tokenizer_model="llama", tokenizer_pre="default",  # llama.cpp's name for SentencePiece BPE
        token_list=[tokenizer.id_to_piece(i) for i in ids], token_scores=[tokenizer.get_score(i) for i in ids],
        token_types=[token_type(tokenizer, i, gguf.TokenType) for i in ids], unk_token_id=0, bos_token_id=1,
        eos_token_id=2, add_bos_token=True, add_eos_token=False, add_space_prefix=False)
    with staged(output) as path:
        writer = gguf.GGUFWriter(path, kind)
        for fact, value in facts.items():
            getattr(writer, f"add_{fact}")(value)
        for module, layer, name, part in split_weights(model):
            if kind == "llama" and module in ("attn.q", "attn.k"):  # for Qwen3, llama.cpp pairs rows as we do
                part = interleave(part, config.n_head)
            writer.add_tensor(f"{NAMES[module][1].format(layer)}.{name}", part.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return f"llama.cpp's {kind}", (
        "Try it (llama.cpp; its older versions call the program llama-cli):\n"
        f"  llama-completion -m \"{output}\" -no-cnv -p \"Once upon a time\" -n 200 --temp 0.6 --top-k 20")


def write_tokenizer(output, contents, model, tokenizer, where):
    with replacing(output) as file:
        file.write(contents["tokenizer"])
    return "its vocabulary", (f"Prepare text with it:\n  python preprocess.py prepare-dataset --tokenizer \"{output}\" "
                              "--dataset YOUR-TEXT --data-dir data/mine")


def write_pt(output, contents, model, tokenizer, where):
    save_checkpoint(output, model, contents["tokenizer"])
    return "weights and tokenizer", f"Try it:\n  python chat.py --checkpoint \"{output}\""


# The output: refused before any work, complete or not there.

def optional(module, format):
    """A module that only this format needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"--format {format} needs the package {package} ({error}): pip install {package}") from error


def check_output(output, format, checkpoint, overwrite):
    """UserError unless `output` may be written. --overwrite replaces an export, never a folder of anything else."""
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise UserError(f"{output} is the checkpoint itself: name another file with --output.")
    if format != "hf" and output.is_dir():
        raise UserError(f"{output} is a folder, and {format} is one file: --output {output / f'model.{format}'}")
    if format == "hf" and output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file, and hf writes a folder: name another one with --output.")
    inside = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if not set(inside) <= set(HF_FILES):
        other = next(name for name in inside if name not in HF_FILES)
        raise UserError(f"{output} holds {other}, which is not of an export: name a new folder with --output.")
    if (inside or output.is_file()) and not overwrite:
        raise UserError(f"{output} exists: add --overwrite to replace it, or name another with --output.")


@contextlib.contextmanager
def staged(output):
    """A path in a temporary folder beside `output`: what the block wrote there takes its place when it ends well."""
    folder = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    new, old = folder / "new", folder / "old"
    try:
        folder.mkdir(parents=True)
        yield new
        if output.is_dir():  # a folder cannot be replaced in one step
            replace_file(output, old)
        try:
            replace_file(new, output)
        except OSError:
            if old.exists():
                replace_file(old, output)
            raise
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(output, what, advice):
    """Print the files with their sizes, and the command to type next."""
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    click.echo(f"Wrote {output} ({what}):")
    for file in files:
        size = file.stat().st_size
        click.echo(f"  {file.name:<24} {f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.1f} kB':>10}")
    click.echo(advice)


WRITERS = {"hf": write_hf, "gguf": write_gguf, "pt": write_pt, "tokenizer": write_tokenizer}


@click.command(cls=GroupedCommand, context_settings=COMMAND_LINE)
@click.option("--format", type=click.Choice(list(WRITERS)), required=True,
              help="hf: a folder for Hugging Face transformers; gguf: a file for llama.cpp; "
              "pt: a checkpoint without what only resuming needs; tokenizer: its SentencePiece file")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="PATH",
              help="folder (hf) or file (the others) to write")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="model to export  [default: best.pt in --out-dir, or else ckpt.pt]")
@click.option("--out-dir", type=click.Path(path_type=Path), default=Path("out"), metavar="RUN",
              help="folder of a training run  [default: out]")
@click.option("--overwrite", is_flag=True, help="replace an earlier export")
def main(format, output, checkpoint, out_dir, overwrite):
    """Write a trained model in the form that another program reads.

    Models with rotary positions (--preset llama or demo) become Llama, those with QK-norm Qwen3; both run in
    transformers and in llama.cpp with no code from here.
    """
    if checkpoint is None:
        best, latest = out_dir / "best.pt", out_dir / "ckpt.pt"
        checkpoint = latest if latest.exists() and not best.exists() else best
    check_output(output, format, checkpoint, overwrite)
    contents = read_checkpoint(checkpoint)
    model = build_model(contents, checkpoint)
    config = model.config
    click.echo(f"Read {checkpoint}: {model.count_parameters() / 1e6:.1f} M parameters, {config.position} positions, "
               f"context {config.block_size}, vocabulary {config.vocab_size}")
    tokenizer = read_tokenizer(contents["tokenizer"], config.vocab_size, checkpoint)
    report(output, *WRITERS[format](output, contents, model, tokenizer, checkpoint))


if __name__ == "__main__":
    main()
