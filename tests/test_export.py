import io
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from conftest import ROOT

import export
from config import GPTConfig, SampleConfig
from model import GPT, NORM_EPS, build_model, read_checkpoint, save_checkpoint

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
def tokenizer_bytes():
    """A tokenizer trained as the project trains them; "hahaha" and "aaaa" give pieces that overlap themselves."""
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
    return out.getvalue()


@pytest.fixture(scope="module")
def pieces(tokenizer_bytes):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)


def random_model(**changes):
    """No weight at its initial value: residual projections of 0 and norms of 1 would hide what an export got wrong."""
    generator = torch.Generator().manual_seed(3)
    model = GPT(GPTConfig(**SHAPE | changes)).eval()
    for weight in model.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.12, generator=generator)
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_bytes):
    """Folders with a best.pt each: llama, qwen3, bias, learned."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (KINDS | {"learned": {}}).items():
        save_checkpoint(folder / name / "best.pt", random_model(**changes), tokenizer_bytes)
    return folder


def run_export(*arguments):
    return CliRunner().invoke(export.main, [str(argument) for argument in arguments])


def exported(folder, runs, name, format):
    output = folder / f"{name}.{format}"
    result = run_export("--format", format, "--out-dir", runs / name, "--output", output)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def hf(tmp_path_factory, runs):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    folder = tmp_path_factory.mktemp("hf")
    return {name: exported(folder, runs, name, "hf") for name in KINDS}


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory, runs):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    folder = tmp_path_factory.mktemp("gguf")
    return {name: exported(folder, runs, name, "gguf") for name in KINDS}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    module.utils.logging.disable_progress_bar()
    return module


def ours(runs, name):
    return build_model(read_checkpoint(runs / name / "best.pt"), name)


def random_ids(shape, seed=1):
    return torch.randint(3, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, n):
    """The n likeliest next tokens one after another, with nothing but the full forward pass."""
    idx = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(n):
            idx = torch.cat([idx, model(idx)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx[0, len(ids):].tolist()


# transformers

@pytest.mark.parametrize("name, stock", [("llama", "Llama"), ("qwen3", "Qwen3"), ("bias", "Llama")])
def test_transformers_computes_the_same_logits(transformers, hf, runs, name, stock):
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(hf[name], output_loading_info=True)
    assert type(theirs).__name__ == f"{stock}ForCausalLM" and theirs.dtype is torch.float32
    assert not any(loading.values()), loading
    idx = random_ids((4, SHAPE["block_size"]))
    with torch.no_grad():
        expected, found = ours(runs, name)(idx), theirs(idx).logits
    difference = (expected - found).abs().max().item()
    print(f"\n{name}: largest logit difference {difference:.1e}, largest logit {expected.abs().max():.2f}")
    assert expected.std() > 0.5
    assert difference <= 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_generates_the_same_greedy_text(transformers, hf, runs, name, pieces):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf[name])
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    found = theirs.generate(**prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=100)[
        0, prompt.input_ids.shape[1]:].tolist()
    sample = SampleConfig(temperature=0.0, top_k=0, repetition_penalty=1.0, max_new_tokens=100)
    model, start = ours(runs, name), torch.tensor([[1] + pieces.encode("Once upon a time")])
    expected = [int(token) for token in model.generate(start, sample, eos_id=2)]
    assert len(expected) > 10
    assert [token for token in found if token != 2] == expected


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_auto_tokenizer_gives_sentencepiece_ids_on_awkward_strings(transformers, hf, name, pieces):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf[name])
    assert len(AWKWARD) == len(set(AWKWARD)) == 60
    wrong = [text for text in AWKWARD if tokenizer(text, add_special_tokens=False).input_ids != pieces.encode(text)]
    assert wrong == []
    assert all(tokenizer.decode(pieces.encode(text)) == text for text in AWKWARD if "▁" not in text)


def test_auto_tokenizer_gives_sentencepiece_ids_on_random_mixtures(transformers, hf, pieces):
    """Runs of what overlaps itself, too: there it matters which pair is joined first."""
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(hf["llama"]), random.Random(5)
    parts = ["a", "aa", "h", "ha", "ah", " ", "\n", "Tom", " the", "1", "é", "你", "</s>", "\t", "ppy", "d"]
    for _ in range(3000):
        text = "".join(rng.choice(parts) * rng.choice([1, 1, 1, 2, 3, 5, 9]) for _ in range(rng.randint(1, 12)))
        assert tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text), text


def test_llama_tokenizer_class_gives_the_same_ids(transformers, hf, pieces):
    tokenizer = transformers.LlamaTokenizer.from_pretrained(hf["llama"])
    assert all(tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text) for text in AWKWARD)


def test_begin_token_goes_in_front_and_a_literal_end_token_is_text(transformers, hf):
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf["llama"])
    assert tokenizer("</s>").input_ids[0] == 1 and 2 not in tokenizer("</s>").input_ids
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id is None and len(tokenizer) == SHAPE["vocab_size"]
    assert tokenizer.decode(tokenizer("a  b \n").input_ids, skip_special_tokens=True) == "a  b \n"


def test_generation_defaults_are_those_of_chat_and_fit_the_context(transformers, hf):
    values = transformers.GenerationConfig.from_pretrained(hf["llama"])
    sample = SampleConfig()
    assert (values.temperature, values.top_k, values.repetition_penalty, values.do_sample) == (
        sample.temperature, sample.top_k, sample.repetition_penalty, True)
    assert values.max_new_tokens == 96 and values.eos_token_id == 2


def test_config_names_what_old_and_new_transformers_read(hf):
    for name in KINDS:
        values = json.loads((hf[name] / "config.json").read_text(encoding="utf-8"))
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10000.0
        assert values["dtype"] == values["torch_dtype"] == "float32"
        assert values["rms_norm_eps"] == NORM_EPS and values["head_dim"] == 16 and values["tie_word_embeddings"]
        assert values["attention_bias"] == values["mlp_bias"] == (name == "bias")


def test_hf_folder_holds_the_listed_files_and_the_tokenizer_unchanged(hf, tokenizer_bytes):
    assert sorted(path.name for path in hf["llama"].iterdir()) == sorted(export.HF_FILES)
    assert (hf["llama"] / "tokenizer.model").read_bytes() == tokenizer_bytes


# GGUF

@pytest.mark.parametrize("name, arch", [("llama", "llama"), ("qwen3", "qwen3"), ("bias", "llama")])
def test_gguf_metadata_says_what_the_model_is(gguf_files, name, arch, pieces):
    from gguf import GGUFReader
    found = {key: field.contents() for key, field in GGUFReader(gguf_files[name]).fields.items()}
    expected = {
        "general.architecture": arch, f"{arch}.context_length": 128, f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 2, f"{arch}.feed_forward_length": 96, f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 4, f"{arch}.attention.key_length": 16, f"{arch}.attention.value_length": 16,
        f"{arch}.rope.dimension_count": 16, f"{arch}.rope.freq_base": 10000.0, f"{arch}.vocab_size": 700,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False}
    assert {key: found.get(key) for key in expected} == expected
    assert found[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(NORM_EPS, rel=1e-6)
    assert found["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in range(700)]
    assert found["tokenizer.ggml.scores"] == pytest.approx([pieces.get_score(i) for i in range(700)])
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}


@pytest.mark.parametrize("name", list(KINDS))
def test_gguf_tensors_are_the_weights_with_llamas_rotary_rows_interleaved(gguf_files, runs, name):
    from gguf import GGUFReader
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(gguf_files[name]).tensors}
    weights = ours(runs, name).state_dict()
    # Four heads of 16 rows: llama.cpp turns rows 2i and 2i + 1 of a head together, we i and i + 8. Qwen3's are as ours.
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


@pytest.mark.parametrize("name", list(KINDS))
def test_llama_cpp_gives_the_same_ids_logits_and_greedy_tokens(gguf_files, runs, name, pieces):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed: pip install llama-cpp-python "
                                                        "(it compiles for many minutes)")
    llm = llama_cpp.Llama(str(gguf_files[name]), n_ctx=128, n_threads=2, logits_all=True, verbose=False,
                          type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    wrong = [text for text in AWKWARD
             if llm.tokenize(text.encode(), add_bos=False, special=False) != pieces.encode(text)]
    assert wrong == []
    model, prompt = ours(runs, name), [1] + pieces.encode("Once upon a time")
    llm.eval(prompt)
    found = []
    for _ in range(100):
        found.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(found[-1:])
    assert found == greedy(model, prompt, 100)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + found]))[0]
    difference = (expected - torch.tensor(llm.scores[:llm.n_tokens])).abs().max().item()
    print(f"\n{name}: largest logit difference {difference:.1e}, largest logit {expected.abs().max():.2f}")
    assert difference < 0.05


# pt

def test_pt_keeps_weights_and_tokenizer_and_nothing_else(runs, tmp_path, tokenizer_bytes):
    model = ours(runs, "learned")
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer_bytes, optimizer={"m": torch.zeros(10000)}, iter=7)
    result = run_export("--format", "pt", "--out-dir", tmp_path, "--output", tmp_path / "small.pt")
    assert result.exit_code == 0 and "chat.py --checkpoint" in result.output
    contents = read_checkpoint(tmp_path / "small.pt")
    assert set(contents) == {"format", "model_config", "model", "tokenizer"}
    assert contents["tokenizer"] == tokenizer_bytes and contents["model_config"] == asdict(model.config)
    again = build_model(contents, "small.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# What is refused, and what is left behind

@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_learned_positions_are_refused_with_the_preset_that_works(runs, tmp_path, format):
    result = run_export("--format", format, "--out-dir", runs / "learned", "--output", tmp_path / "x")
    assert result.exit_code == 1
    assert "learned positions" in result.output and "--preset llama" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_bias_with_qk_norm_is_refused(tmp_path, tokenizer_bytes, format):
    model = random_model(position="rotary", qk_norm=True, bias=True)
    save_checkpoint(tmp_path / "best.pt", model, tokenizer_bytes)
    result = run_export("--format", format, "--out-dir", tmp_path, "--output", tmp_path / "x")
    assert result.exit_code == 1 and "--no-bias" in result.output and not (tmp_path / "x").exists()


@pytest.mark.parametrize("format, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_a_missing_package_says_how_to_get_it(runs, tmp_path, monkeypatch, format, package):
    for module in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run_export("--format", format, "--out-dir", runs / "llama", "--output", tmp_path / "x")
    assert result.exit_code == 1 and f"pip install {package}" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_size_is_refused(tmp_path, tokenizer_bytes):
    save_checkpoint(tmp_path / "best.pt", random_model(position="rotary", vocab_size=701), tokenizer_bytes)
    result = run_export("--format", "hf", "--out-dir", tmp_path, "--output", tmp_path / "x")
    assert result.exit_code == 1 and "700 tokens (the model 701)" in result.output


@pytest.mark.parametrize("format", ["hf", "gguf", "pt"])
def test_an_earlier_export_is_replaced_only_with_overwrite(runs, tmp_path, format):
    pytest.importorskip({"hf": "safetensors", "gguf": "gguf", "pt": "torch"}[format])
    arguments = "--format", format, "--out-dir", runs / "llama", "--output", tmp_path / "x"
    assert run_export(*arguments).exit_code == 0
    target = tmp_path / "x" / "config.json" if format == "hf" else tmp_path / "x"
    target.write_text("old")
    result = run_export(*arguments)
    assert result.exit_code == 1 and "--overwrite" in result.output and target.read_text() == "old"
    assert run_export(*arguments, "--overwrite").exit_code == 0
    assert target.read_bytes() != b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("arguments, words", [
    (["--format", "hf", "--output", "own"], "holds letter.txt"),
    (["--format", "hf", "--output", "own/letter.txt"], "hf writes a folder"),
    (["--format", "gguf", "--output", "own"], "model.gguf"),
    (["--format", "pt", "--output", "out/best.pt"], "the checkpoint itself")])
def test_overwrite_never_touches_what_is_not_an_export(runs, tmp_path, monkeypatch, arguments, words, tokenizer_bytes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("dear")
    save_checkpoint(tmp_path / "out" / "best.pt", random_model(), tokenizer_bytes)
    before = (tmp_path / "out" / "best.pt").read_bytes()
    result = run_export(*arguments, "--overwrite")
    assert result.exit_code == 1 and words in result.output
    assert (tmp_path / "own" / "letter.txt").read_text() == "dear"
    assert (tmp_path / "out" / "best.pt").read_bytes() == before


@pytest.mark.parametrize("kind", ["OSError", "SafetensorError", "KeyboardInterrupt"])
def test_a_failure_midway_keeps_the_earlier_export_and_leaves_nothing_else(hf, runs, tmp_path, monkeypatch, kind):
    import safetensors.torch
    arguments = "--format", "hf", "--out-dir", runs / "llama", "--output", tmp_path / "x"
    assert run_export(*arguments).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    error = {"OSError": OSError(28, "disk full"), "SafetensorError": safetensors.SafetensorError("disk full"),
             "KeyboardInterrupt": KeyboardInterrupt()}[kind]

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    result = run_export(*arguments, "--overwrite")
    assert result.exit_code == 1
    assert kind == "KeyboardInterrupt" or f"cannot write {tmp_path / 'x'}: disk full" in result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_moved_in_place_gives_the_earlier_one_back(hf, runs, tmp_path, monkeypatch):
    arguments = "--format", "hf", "--out-dir", runs / "llama", "--output", tmp_path / "x"
    assert run_export(*arguments).exit_code == 0
    (tmp_path / "x" / "config.json").write_text("old")
    replace = os.replace

    def locked(source, target):
        if str(source).endswith("new"):
            raise PermissionError(13, "in use")
        replace(source, target)
    monkeypatch.setattr(export.os, "replace", locked)
    monkeypatch.setattr(export.replace_file, "__defaults__", (0.1,))  # seconds
    result = run_export(*arguments, "--overwrite")
    assert result.exit_code == 1 and f"cannot write {tmp_path / 'x'}: in use" in result.output
    assert (tmp_path / "x" / "config.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_best_checkpoint_is_taken_and_no_checkpoint_says_what_to_type(tmp_path, tokenizer_bytes):
    for name, position in [("best.pt", "rotary"), ("ckpt.pt", "learned")]:
        save_checkpoint(tmp_path / name, random_model(position=position), tokenizer_bytes)
    result = run_export("--format", "pt", "--out-dir", tmp_path, "--output", tmp_path / "x.pt")
    assert result.exit_code == 0 and "best.pt: 0.1 M parameters, rotary" in result.output
    result = run_export("--format", "pt", "--out-dir", tmp_path / "none", "--output", tmp_path / "y.pt")
    assert result.exit_code == 1 and "python train.py" in result.output


def test_the_report_names_files_sizes_and_the_next_command(runs, tmp_path, hf):
    result = run_export("--format", "hf", "--out-dir", runs / "llama", "--output", tmp_path / "my model")
    assert all(name in result.output for name in export.HF_FILES)
    size = (tmp_path / "my model" / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.1f} MB" in result.output
    assert f"pipeline('text-generation', '{(tmp_path / 'my model').as_posix()}')" in result.output


def test_optional_packages_are_not_imported_before_they_are_needed(tmp_path):
    code = ("import sys, export; "
            "print(sorted({'safetensors', 'gguf', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]" and list(tmp_path.iterdir()) == []
