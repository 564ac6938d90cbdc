import io
import json
import os
import random
import shlex
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from click.testing import CliRunner

import export
from config import GPTConfig, SampleConfig
from data import Tokenizer
from model import GPT, NORM_EPS, load_checkpoint, save_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder needs no network, and a test must not look for one

SHAPE = dict(block_size=128, vocab_size=700, n_layer=2, n_head=4, n_embd=64, intermediate_size=96)
KINDS = {"llama": dict(position="rotary"), "qwen3": dict(position="rotary", qk_norm=True),
         "bias": dict(position="rotary", bias=True)}

AWKWARD = [
    "", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", " a  b ", "\n", "\n\n", "\n\n\n", "a\n", "\na", " \n ", "\t",
    "\t\ta", "a\tb", "\r\n", "a\r\nb", "Once upon a time", " Once upon a time", "Once  upon   a    time ",
    "Tom said, \"No!\"\n\nThe end.", "0", "12", "1234567890", "3.14159", "1,000 dogs", "你好", "日本語の文章です。",
    "안녕하세요", "🙂", "👩‍👩‍👧‍👦", "🇫🇮 flag", "café", "cafe\u0301", "naïve Ångström", "Z\u0300\u0301\u0302algo",
    "ß ſ ﬁ Ⅷ ²", "Привет, мир", "مرحبا", "</s>", "<s>", "<unk>", "<s>Once</s>", "a</s>b", "<0x0A>", "<0x41>", "▁",
    "a▁b", "\x00", "a\x00b", "\x01\x02\x1b[0m\x7f", "\u200b\ufeff\u00a0", "\U0010ffff",
    "ha" * 40 + "a" * 40, "supercalifragilistic" * 50,
    "...!?;:'\"()[]{}<>@#$%^&*_-+=~`|\\/"]


@pytest.fixture(scope="module")
def tokenizer():
    """Trained as the project trains them; "hahaha" and "aaaa" give pieces that overlap themselves."""
    rng = random.Random(0)
    words = "Tom Lily dog cat the a and ran saw big happy said day park ball hahaha aaaa café time once upon".split()
    ends = [" "] * 12 + [", ", ". ", ".\n", "\n\n", "  ", "! 12 "]
    documents = ["".join(rng.choice(words) + rng.choice(ends) for _ in range(120)) for _ in range(60)]
    documents += ["".join(rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ ") for _ in range(400)) for _ in range(40)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=out, model_type="bpe", vocab_size=SHAPE["vocab_size"],
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        split_digits=True, max_sentence_length=65536, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return Tokenizer(out.getvalue())


def random_model(**changes):
    """No weight has its initial value: residual projections of 0 and norms of 1 would hide errors of an export."""
    generator = torch.Generator().manual_seed(3)
    model = GPT(GPTConfig(**SHAPE | changes)).eval()
    for weight in model.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.12, generator=generator)
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """Folders with a best.pt each: llama, qwen3, bias, learned, both (QK-norm and bias)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (KINDS | {"learned": {}, "both": KINDS["qwen3"] | KINDS["bias"]}).items():
        save_checkpoint(folder / name / "best.pt", random_model(**changes), tokenizer.model_bytes)
    return folder


def run_export(*arguments, code=0):
    """The output of export.py with these arguments, whose exit code must be `code`."""
    result = CliRunner().invoke(export.main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def exported(folder, runs, format):
    for name in KINDS:
        run_export("--format", format, "--out-dir", runs / name, "--output", folder / name)
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def hf(tmp_path_factory, runs):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    return exported(tmp_path_factory.mktemp("hf"), runs, "hf")


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory, runs):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    return exported(tmp_path_factory.mktemp("gguf"), runs, "gguf")


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    module.utils.logging.disable_progress_bar()
    return module


def our_model(runs, name):
    return load_checkpoint(runs / name / "best.pt")[0]


# -----------------------------------------------------------------------------
# Hugging Face transformers

@pytest.mark.parametrize("name, stock", [("llama", "Llama"), ("qwen3", "Qwen3"), ("bias", "Llama")])
def test_transformers_computes_the_same_logits(transformers, hf, runs, name, stock):
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(hf[name], output_loading_info=True)
    assert type(theirs).__name__ == f"{stock}ForCausalLM" and theirs.dtype is torch.float32
    assert not any(loading.values()), loading
    idx = torch.randint(3, SHAPE["vocab_size"], (4, SHAPE["block_size"]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = our_model(runs, name)(idx), theirs(idx).logits
    assert expected.std() > 0.5
    assert (expected - found).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_generates_the_same_greedy_text_from_what_its_tokenizer_returns(
        transformers, hf, runs, name, tokenizer):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf[name])
    prompt = transformers.AutoTokenizer.from_pretrained(hf[name])("Once upon a time", return_tensors="pt")
    found = theirs.generate(**prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=100)
    start = torch.tensor([[1, *tokenizer.encode("Once upon a time")]])
    greedy = SampleConfig(temperature=0.0, top_k=0, repetition_penalty=1.0, max_new_tokens=100)
    expected = [int(token) for token in our_model(runs, name).generate(start, greedy, eos_id=2)]
    assert len(expected) > 10
    assert [token for token in found[0].tolist() if token != 2] == start[0].tolist() + expected


def test_padding_changes_no_text_of_a_batch(transformers, hf):
    model = transformers.AutoModelForCausalLM.from_pretrained(hf["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf["llama"])
    texts = ["Tom", "Once upon a time the big dog ran"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"} and batch.attention_mask.min() == 0
    settings = dict(do_sample=False, max_new_tokens=20)
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **settings) for text in texts]
    # <unk> and not </s>, which collators of training batches would mask out of the loss at the end of every story.
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 0
    assert tokenizer.batch_decode(model.generate(**batch, **settings), skip_special_tokens=True) == [
        tokenizer.decode(ids[0], skip_special_tokens=True) for ids in alone]


def test_transformers_encodes_awkward_texts_as_sentencepiece_does(transformers, hf, tokenizer):
    assert len(AWKWARD) == len(set(AWKWARD)) == 60
    for load in (transformers.AutoTokenizer, transformers.LlamaTokenizer):
        theirs = load.from_pretrained(hf["llama"])
        encode = {text: theirs(text, add_special_tokens=False).input_ids for text in AWKWARD}
        assert [text for text, ids in encode.items() if ids != tokenizer.processor.encode(text)] == []
        # U+2581 is SentencePiece's own mark for a space; only our Tokenizer gives it back.
        assert [text for text, ids in encode.items() if ids != tokenizer.encode(text)] == ["▁", "a▁b"]
        assert [text for text, ids in encode.items() if theirs.decode(ids) != text] == ["▁", "a▁b"]


def test_transformers_encodes_random_mixtures_as_sentencepiece_does(transformers, hf, tokenizer):
    """With runs of pieces that overlap themselves, where it matters which pair is joined first."""
    theirs, rng = transformers.AutoTokenizer.from_pretrained(hf["llama"]), random.Random(5)
    parts = ["a", "aa", "h", "ha", "ah", " ", "\n", "Tom", " the", "1", "é", "你", "</s>", "\t", "ppy", "d"]
    for _ in range(3000):
        text = "".join(rng.choice(parts) * rng.choice([1, 1, 1, 2, 3, 5, 9]) for _ in range(rng.randint(1, 12)))
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text), text


def test_bos_comes_first_and_a_literal_eos_is_text(transformers, hf):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf["llama"])
    assert tokenizer("</s>").input_ids[0] == 1 and 2 not in tokenizer("</s>").input_ids
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == SHAPE["vocab_size"] and tokenizer.model_max_length == SHAPE["block_size"]
    assert tokenizer.decode(tokenizer("a  b \n").input_ids, skip_special_tokens=True) == "a  b \n"


def test_generation_defaults_are_those_of_chat_and_fit_the_context(transformers, hf):
    values, sampling = transformers.GenerationConfig.from_pretrained(hf["llama"]), SampleConfig()
    assert (values.temperature, values.top_k, values.top_p, values.repetition_penalty, values.do_sample) == (
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, True)
    assert values.max_new_tokens == 96 and values.eos_token_id == 2


def test_hf_files_have_what_old_and_new_transformers_read(hf):
    for name in KINDS:
        values = json.loads((hf[name] / "config.json").read_text(encoding="utf-8"))
        assert values["architectures"] == ["Qwen3ForCausalLM" if name == "qwen3" else "LlamaForCausalLM"]
        assert values["rope_theta"] == 10000.0 and values["torch_dtype"] == "float32"
        assert values["rms_norm_eps"] == NORM_EPS and values["head_dim"] == 16 and values["tie_word_embeddings"]
        assert values["attention_bias"] == values["mlp_bias"] == (name == "bias")
        # Version 4 would return token_type_ids otherwise, which generate refuses.
        values = json.loads((hf[name] / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert values["model_input_names"] == ["input_ids", "attention_mask"]


def test_hf_folder_has_the_listed_files_and_the_tokenizer_unchanged(hf, tokenizer):
    assert {path.name for path in hf["llama"].iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json"}
    assert (hf["llama"] / "tokenizer.model").read_bytes() == tokenizer.model_bytes


# -----------------------------------------------------------------------------
# GGUF

@pytest.mark.parametrize("name, arch", [("llama", "llama"), ("qwen3", "qwen3"), ("bias", "llama")])
def test_gguf_metadata_describe_model_tokenizer_and_sampling(gguf_files, name, arch, tokenizer):
    from gguf import GGUFReader
    found = {key: field.contents() for key, field in GGUFReader(gguf_files[name]).fields.items()}
    expected = {
        "general.architecture": arch, "general.name": name, f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 64, f"{arch}.block_count": 2, f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4, f"{arch}.attention.head_count_kv": 4, f"{arch}.attention.key_length": 16,
        f"{arch}.attention.value_length": 16, f"{arch}.rope.dimension_count": 16, f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": 700, "tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False}
    assert {key: found.get(key) for key in expected} == expected
    assert found[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(NORM_EPS, rel=1e-6)
    pieces = tokenizer.processor
    assert found["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in range(700)]
    assert found["tokenizer.ggml.scores"] == pytest.approx([pieces.get_score(i) for i in range(700)])
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    chat = SampleConfig()
    sampling = {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith("general.sampling")}
    assert sampling == pytest.approx(dict(
        temp=chat.temperature, top_k=chat.top_k, top_p=chat.top_p, min_p=chat.min_p,
        penalty_last_n=chat.repetition_window, penalty_repeat=chat.repetition_penalty))


def test_gguf_is_written_without_sampling_defaults_by_an_older_library(runs, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    for name in [name for name in vars(gguf.GGUFWriter) if name.startswith("add_sampling")]:
        monkeypatch.delattr(gguf.GGUFWriter, name)
    run_export("--format", "gguf", "--out-dir", runs / "llama", "--output", tmp_path / "x.gguf")
    assert not [key for key in gguf.GGUFReader(tmp_path / "x.gguf").fields if "sampling" in key]


@pytest.mark.parametrize("name", list(KINDS))
def test_gguf_tensors_are_the_weights_with_the_rotary_rows_of_llama_interleaved(gguf_files, runs, name):
    from gguf import GGUFReader
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(gguf_files[name]).tensors}
    weights = our_model(runs, name).state_dict()
    # Four heads of 16 rows: llama.cpp pairs rows 2i and 2i + 1 of a head, we i and i + 8. Qwen3's are as ours.
    order = [16 * h + i + 8 * j for h in range(4) for i in range(8) for j in range(2)]
    order = list(range(64)) if name == "qwen3" else order
    expected = {"token_embd.weight": weights["wte.weight"], "output_norm.weight": weights["ln_f.weight"]}
    for layer in range(2):
        block = {key[9:]: weight for key, weight in weights.items() if key.startswith(f"blocks.{layer}.")}
        theirs = {"attn_norm.weight": block["ln_1.weight"], "ffn_norm.weight": block["ln_2.weight"]}
        for kind in ("weight", "bias") if name == "bias" else ("weight",):
            q, k, v = block[f"attn.c_attn.{kind}"].split(64)
            gate, up = block[f"mlp.c_fc.{kind}"].split(96)
            parts = dict(attn_q=q[order], attn_k=k[order], attn_v=v, attn_output=block[f"attn.c_proj.{kind}"],
                         ffn_gate=gate, ffn_up=up, ffn_down=block[f"mlp.c_proj.{kind}"])
            theirs |= {f"{module}.{kind}": part for module, part in parts.items()}
        if name == "qwen3":
            theirs |= {f"attn_{norm}.weight": block[f"attn.{norm}.weight"] for norm in ("q_norm", "k_norm")}
        expected |= {f"blk.{layer}.{module}": part for module, part in theirs.items()}
    assert sorted(found) == sorted(expected)  # tied: no output.weight
    assert [module for module in found if not torch.equal(found[module], expected[module])] == []


# -----------------------------------------------------------------------------
# Our own formats

def test_pt_keeps_weights_and_tokenizer_and_nothing_else(runs, tmp_path, tokenizer):
    model = our_model(runs, "learned")
    save_checkpoint(tmp_path / "best.pt", model, tokenizer.model_bytes)
    parts = set(load_checkpoint(tmp_path / "best.pt")[1])
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer.model_bytes, optimizer={"m": torch.zeros(10000)}, iter=7)
    run_export("--format", "pt", "--checkpoint", tmp_path / "ckpt.pt", "--output", tmp_path / "small.pt")
    copy, checkpoint = load_checkpoint(tmp_path / "small.pt")
    assert set(checkpoint) == parts
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer.model_bytes, word_prompts=True, iter=7)
    run_export("--format", "pt", "--checkpoint", tmp_path / "ckpt.pt", "--output", tmp_path / "words.pt")
    assert set(load_checkpoint(tmp_path / "words.pt")[1]) == parts | {"word_prompts"}, "which chat.py --words asks for"
    assert checkpoint["tokenizer"] == tokenizer.model_bytes and checkpoint["model_config"] == asdict(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True))


def test_tokenizer_is_the_one_in_the_checkpoint(runs, tmp_path, tokenizer):
    run_export("--format", "tokenizer", "--out-dir", runs / "learned", "--output", tmp_path / "new" / "tok.model")
    assert (tmp_path / "new" / "tok.model").read_bytes() == tokenizer.model_bytes


# -----------------------------------------------------------------------------
# What is refused, what is replaced, what is printed

@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("name, words, flag", [("learned", "learned positions", "--preset llama"),
                                               ("both", "QK-norm and biases", "--no-bias")])
def test_a_model_that_no_architecture_matches_is_refused_with_the_flag_that_helps(
        runs, tmp_path, name, words, flag, format):
    output = run_export("--format", format, "--out-dir", runs / name, "--output", tmp_path / "x", code=1)
    assert words in output and output.endswith(f"python train.py {flag}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(runs, tmp_path, monkeypatch, format, package):
    for module in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    output = run_export("--format", format, "--out-dir", runs / "llama", "--output", tmp_path / "x", code=1)
    assert output.endswith(f"pip install {package}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "gguf", "pt", "tokenizer"])
def test_an_earlier_export_is_replaced_only_with_overwrite(runs, tmp_path, format):
    pytest.importorskip({"hf": "safetensors", "gguf": "gguf"}.get(format, "torch"))
    arguments = "--format", format, "--out-dir", runs / "llama", "--output", tmp_path / "x"
    run_export(*arguments)
    target = tmp_path / "x" / "config.json" if format == "hf" else tmp_path / "x"
    target.write_text("old")
    assert "--overwrite" in run_export(*arguments, code=1) and target.read_text() == "old"
    run_export(*arguments, "--overwrite")
    assert target.read_bytes() != b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("arguments, words", [
    (["--format", "hf", "--output", "own/letter.txt"], "cannot write"),
    (["--format", "gguf", "--output", "empty"], "cannot write"),
    (["--format", "pt", "--output", "out/best.pt"], "the checkpoint itself")])
def test_overwrite_never_touches_what_is_not_an_export(runs, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("own", "out", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own" / "letter.txt").write_text("dear")
    (tmp_path / "out" / "best.pt").write_bytes((runs / "llama" / "best.pt").read_bytes())
    assert words in run_export(*arguments, "--overwrite", code=1)
    assert (tmp_path / "own" / "letter.txt").read_text() == "dear" and (tmp_path / "empty").is_dir()
    assert (tmp_path / "out" / "best.pt").read_bytes() == (runs / "llama" / "best.pt").read_bytes()


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_midway_keeps_the_earlier_export_and_leaves_nothing_else(runs, tmp_path, monkeypatch, format, error):
    gguf, safetensors = pytest.importorskip("gguf"), pytest.importorskip("safetensors.torch")
    arguments = "--format", format, "--out-dir", runs / "llama", "--output", tmp_path / "x"
    run_export(*arguments)

    def contents():
        return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args):
        raise error
    before = contents()
    monkeypatch.setattr(safetensors, "save", fail)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    output = run_export(*arguments, "--overwrite", code=130 if isinstance(error, KeyboardInterrupt) else 1)
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in output
    assert contents() == before and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_best_pt_is_exported_if_there_is_one(runs, tmp_path):
    for source, name in (("llama", "best.pt"), ("learned", "ckpt.pt")):
        (tmp_path / name).write_bytes((runs / source / "best.pt").read_bytes())
    assert "best.pt" in run_export("--format", "pt", "--out-dir", tmp_path, "--output", tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")[0].config.position == "rotary"
    (tmp_path / "best.pt").unlink()
    assert "ckpt.pt" in run_export("--format", "pt", "--out-dir", tmp_path, "--output", tmp_path / "y.pt")


def test_the_next_command_can_be_pasted_whatever_the_path(runs, tmp_path, monkeypatch):
    pytest.importorskip("gguf"), pytest.importorskip("safetensors")
    commands = {}
    for format in ("hf", "gguf", "pt", "tokenizer"):
        path = tmp_path / f"Tom's {format}"
        output = run_export("--format", format, "--out-dir", runs / "llama", "--output", path)
        assert output.startswith(f"Wrote {path} from {runs / 'llama' / 'best.pt'} (0.1 M parameters).\n")
        commands[format] = shlex.split(output.splitlines()[-1])
    llama = commands["gguf"]
    assert llama[:3] == ["llama-completion", "-m", str(tmp_path / "Tom's gguf")]
    assert llama[3:] == ["-no-cnv", "-p", "Once upon a time", "-n", "96"]
    assert commands["pt"] == ["python", "chat.py", "--checkpoint", str(tmp_path / "Tom's pt")]
    assert commands["tokenizer"][2:5] == ["prepare-dataset", "--tokenizer", str(tmp_path / "Tom's tokenizer")]
    asked = []
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        pipeline=lambda *words: asked.append(words) or (lambda prompt: [dict(generated_text=prompt)])))
    assert commands["hf"][:2] == ["python", "-c"]
    exec(commands["hf"][2], {})
    assert asked == [("text-generation", (tmp_path / "Tom's hf").as_posix())]
