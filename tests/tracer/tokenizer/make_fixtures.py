#!/usr/bin/env python3
"""Trains small tokenizers of every kind that the tracer reads and writes down what Hugging Face's tokenizers (and, for a
tokenizer.model, SentencePiece) make of a few thousand strings:

    python3 -m venv venv && venv/bin/pip install tokenizers sentencepiece
    venv/bin/python tests/tracer/tokenizer/make_fixtures.py

writes beside itself `strings.json`, a list of strings, and for each kind a folder with `tokenizer.json` or
`tokenizer.model` and `cases.json`:
    {"ids": [[...], ...], "decoded": {"<index>": "..."}}   for each string the ids, and what the ids decode to, without
                                                          special tokens, where that is not the string itself
With --check it writes nothing and fails if what it would write differs from what is there. That needs the versions that
the fixtures were made with: Python 3.11, tokenizers 0.23.3 and sentencepiece 0.2.3. Others know other characters or train
other vocabularies, which is no mistake.
"""

import argparse
import io
import json
import pathlib
import random
import sys
import unicodedata

import sentencepiece
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = HERE.parents[2] / "traces" / "prompts"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")

# Sentences of our own in many scripts, for training and for the strings.
SENTENCES = [
    "The quick gardener paints seven old doors before the rain comes.",
    "Die Straße führt über die Brücke, groß und schön, nach Köln.",
    "L'été dernier, nous avons mangé des crêpes à la châtaigne.",
    "¿Dónde está la señora que cantó anoche en el café?",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Işık hızlıdır; İstanbul'da ağaçlar çiçek açtı.",
    "Mùa xuân đến, những cánh đồng lúa trở nên xanh mướt.",
    "Сегодня утром снег лежал на крышах, и было очень тихо.",
    "Вчора ми їхали потягом до Києва й пили чай.",
    "Το πρωί ο ήλιος λάμπει πάνω από τη θάλασσα.",
    "בבוקר שתיתי קפה וקראתי ספר ישן.",
    "שָׁלוֹם לְכֻלָּם, מַה נִּשְׁמָע?",
    "في الصباح شربت القهوة وقرأت كتابا قديما.",
    "السَّلَامُ عَلَيْكُمْ وَرَحْمَةُ اللَّهِ",
    "صبح زود به کوه رفتیم و چای نوشیدیم.",
    "सुबह मैंने चाय पी और एक पुरानी किताब पढ़ी।",
    "সকালে আমি চা খেয়ে একটি বই পড়লাম।",
    "காலையில் நான் தேநீர் குடித்தேன்.",
    "ఉదయం నేను టీ తాగి పుస్తకం చదివాను.",
    "ตอนเช้าฉันดื่มกาแฟและอ่านหนังสือ",
    "ព្រឹកនេះខ្ញុំផឹកកាហ្វេ។",
    "မနက်ခင်းမှာ ကော်ဖီသောက်ပါတယ်။",
    "დილით ყავას ვსვამ და წიგნს ვკითხულობ.",
    "Առավոտյան սուրճ եմ խմում։",
    "በጠዋት ቡና ጠጣሁ።",
    "今天早上我喝了咖啡,读了一本旧书。",
    "今朝はコーヒーを飲んで、古い本を読みました。ガギグゲゴ、パピプペポ。",
    "오늘 아침에 커피를 마시고 오래된 책을 읽었습니다.",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𝓯𝓪𝓷𝓬𝔂 𐍈𐌰𐌹 𠀀𠮷",
]

CODE = [
    "def f(x, *, y=0):\n    return x ** 2 + y  # a comment\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "SELECT name, COUNT(*) FROM birds WHERE wings >= 2 GROUP BY name;\r\n",
    "let z = a?.b ?? c && !(d || e) ? `x${y}` : null;",
    "<div class=\"box\" id='n-1'>&nbsp;&amp;</div>\n\n\n<br/>",
    "x = {'k': [1, 2.5e-10, 0xFF, 0b101, 1_000_000], \"q\": None}\n\n\n\n",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "if err != nil {\n\t\treturn fmt.Errorf(\"read %q: %w\", path, err)\n\t}\n",
    "#!/usr/bin/env bash\nset -euo pipefail\necho \"${1-}\" | sed 's/a\\/b/c/g' > /dev/null 2>&1\n",
    "0123456789 12345 1,234,567.89 ٠١٢٣٤٥٦٧٨٩ ०१२३ ⅣⅫ ½¾ ²³ ①②",
    "+1 (555) 010-9999, 2024-02-29T23:59:60Z, v1.2.3-rc.4+build.5, 99.9%",
    "don't won't I'll I'd you're they've it's 'S 'T 'RE 'VE 'M 'LL 'D ſ 'ſ K'm o'clock 'tis",
]

EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "❤️", "☺︎", "🤷🏿‍♀️", "1️⃣", "🦅", "👨🏻‍🚀", "🧑‍💻"]

SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\t\t", "\u00a0", "\u2003", "\u3000", "\u2028",
          "\u2029", "\u0085", "\u180e", "\u200b", "\u202f", "\ufeff", "\v", "\f", "\u1680", "     ", "\x1c", "\x1f"]

CONTROLS = ["\x00", "\x01", "\x07", "\x08", "\x1b[31m", "\x7f", "\u0080", "\u009f", "\u00ad", "\u200d", "\u200e", "\u2060",
            "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\U000e0041"]

MARKS = ["e\u0301", "é", "a\u0323\u0302", "a\u0302\u0323", "ậ", "\u0344", "\u212b", "Å", "A\u030a", "\u1100\u1161\u11a8",
         "각", "가\u11a8", "\u0958", "क\u093c", "\u0f77", "\ufb2c", "ש\u05bc\u05c1", "\u2126", "\u1e9b\u0323", "q\u0307\u0323",
         "\u0301x", "\u093c", "\u09c7\u09be", "\u0b47\u0b56", "\u1025\u102e", "\u304b\u3099", "ｶ\uff9e", "\ufb01", "ŀ",
         "\u01c5", "\u0130", "i\u0307", "ß", "\u1e9e", "\u0149", "\u017f", "\u212a", "\u03c2", "\U0001d15e", "\u0340", "\u0387"]


def strings(special, added):
    """The strings to tokenize; `special` and `added` are names of tokens that some kind has."""
    generator = random.Random(2605)
    found = [""]
    found += SENTENCES + CODE + EMOJI + SPACES + CONTROLS + MARKS
    found += [chr(c) for c in range(256)]
    found += [unicodedata.normalize(form, s) for form in ("NFC", "NFD", "NFKC", "NFKD") for s in SENTENCES]
    prompts = "".join(p.read_text(encoding="utf-8") for p in sorted(PROMPTS.glob("*.txt")))
    for _ in range(150):
        start = generator.randrange(len(prompts) - 200)
        found.append(prompts[start:start + generator.randrange(1, 200)])

    words = sorted({w for s in SENTENCES + CODE for w in s.split()})
    for _ in range(350):  # words of all scripts with all kinds of space
        found.append("".join(generator.choice(words) + generator.choice(SPACES) for _ in range(generator.randrange(1, 8))))
    pieces = EMOJI + SPACES + CONTROLS + MARKS + words + list("!?.,;:-_/\\|()[]{}<>@#$%^&*+=~`'\"0123456789aZ▁Ġ")
    for _ in range(450):  # anything after anything
        found.append("".join(generator.choice(pieces) for _ in range(generator.randrange(1, 12))))
    names = special + added
    around = SPACES + ["", "", "", "a", "Z", "_", "9", "é", "日", "\u0301", ".", "<", ">", "|"] + words
    for _ in range(400):  # special tokens inside text
        found.append("".join(generator.choice(around) + generator.choice(names) + generator.choice(around)
                             for _ in range(generator.randrange(1, 4))))
    for name in names:
        found += [name, name + name, " " + name + " ", "x" + name + "y", name[:-1], name[1:], name.upper(),
                  name + "\n\n" + name, "  " + name + "  " + name + "  "]
    assigned = [c for c in range(0x110000)
                if unicodedata.category(chr(c)) not in ("Cs", "Cn") and not 0xE000 <= c < 0xF900 and c < 0xF0000]
    for _ in range(250):  # any characters that Python's Unicode knows
        found.append("".join(chr(generator.choice(assigned)) for _ in range(generator.randrange(1, 6))))
    blocks = [0x0100, 0x0300, 0x0370, 0x0400, 0x0590, 0x0600, 0x0900, 0x0980, 0x0B80, 0x0E00, 0x1100, 0x1E00, 0x2000, 0x2100,
              0x2460, 0x3040, 0x3200, 0x4E00, 0xAC00, 0xFB00, 0xFF00, 0x1D400, 0x1F300, 0x1F900]
    for _ in range(200):
        block = generator.choice(blocks)
        found.append("".join(chr(block + generator.randrange(0x80)) + generator.choice(["", "", " "])
                             for _ in range(generator.randrange(1, 10))))
    for n in (1, 2, 3, 7, 8, 15, 16, 31, 64, 127, 300):
        found += [" " * n, "\n" * n, "\t" * n, "a" * n, "ab" * n, "7" * n, "-" * n, "é" * n, "日" * n, "😀" * n,
                  " " * n + "x", "x" + " " * n, " \n" * n, "▁" * n]
    found += ["".join(generator.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(1500)),
              "".join(generator.choice("etaoin ") for _ in range(1500)),
              "".join(generator.choice("0123456789") for _ in range(500))]
    unique = list(dict.fromkeys(found))
    # What Python's Unicode does not know, the tracer's may not know either.
    return [s for s in unique if all(unicodedata.category(c) != "Cn" or c in "\ufffe\uffff\U0010ffff" for c in s)]


def corpus():
    text = [line for p in sorted(PROMPTS.glob("*.txt")) for line in p.read_text(encoding="utf-8").splitlines(True)]
    return text + SENTENCES * 3 + CODE * 3 + [e + " " for e in EMOJI]


def trained(tokenizer, size, special, alphabet=()):
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False))
    return tokenizer


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def retrained(tokenizer, **options):
    """The same vocabulary with other options of the model: after training, which forgets them."""
    state = json.loads(tokenizer.to_str())
    state["model"].update(options)
    return Tokenizer.from_str(json.dumps(state))


def llama3():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, 1100, [], BYTES)
    # Words that no merge makes, as in Llama 3's vocabulary.
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for word in ("Ġfalcon", "zqxzqx", "ĠDie"):
        vocabulary.setdefault(word, len(vocabulary))
    state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                  "<|eot_id|>"])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1",
                                      special_tokens=[(bos, tokenizer.token_to_id(bos))])])
    return tokenizer


def qwen2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    trained(tokenizer, 900, [], BYTES)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return retrained(tokenizer, continuing_subword_prefix="", end_of_word_suffix="")


def gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trained(tokenizer, 800, ["<|endoftext|>"], BYTES)
    # One of each kind of added token.
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<pad>", rstrip=True, normalized=False), AddedToken("falcon", single_word=True),
                          AddedToken("[both]", lstrip=True, rstrip=True), AddedToken("\u00e9t\u00e9", single_word=True),
                          AddedToken("[bothy]")])
    state = json.loads(tokenizer.to_str())
    # As files of older versions have them.
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    return Tokenizer.from_str(json.dumps(state)), state


def digits():
    """Several steps of pre-tokenization in a row, with every behaviour of Split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\r\n", "\n"),
                                                 normalizers.Replace(Regex(r"[!?]{2,}"), "!")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\r\n]"), "merged_with_previous"),
        pre_tokenizers.Split(Regex(r"\s?[A-Za-z\u00b5\u00c0-\u024f]+"), "contiguous"),
        pre_tokenizers.Split(";", "merged_with_next"),
        pre_tokenizers.Split(Regex(r"\p{L}\p{M}*+|[^\p{L}]++"), "removed", invert=True),
        pre_tokenizers.Split("#", "removed"),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, 700, ["<s>", "</s>"], BYTES)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


SENTENCEPIECE_SPECIAL = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
SPACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def without_byte_tokens(tokenizer, special):
    """Byte tokens are in the vocabulary without being looked for in the text, as after SentencePiece."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


def llama2():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    trained(tokenizer, 1200, SENTENCEPIECE_SPECIAL)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(SPACED + [decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    tokenizer = without_byte_tokens(tokenizer, ["<unk>", "<s>", "</s>"])
    tokenizer = retrained(tokenizer, fuse_unk=True, byte_fallback=True)
    tokenizer.add_tokens([AddedToken("<placeholder>", normalized=True)])
    return tokenizer


def metaspace():
    """As newer conversions of Llama and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    trained(tokenizer, 1200, SENTENCEPIECE_SPECIAL + ["[INST]", "[/INST]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(SPACED + [decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    tokenizer = without_byte_tokens(tokenizer, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    return retrained(tokenizer, fuse_unk=True, byte_fallback=True)


def metaspace_unknown():
    """Words that are split, a space before each text, and no bytes to fall back to."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trained(tokenizer, 600, ["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return retrained(tokenizer, unk_token="<unk>", fuse_unk=False)


def gemma():
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    trained(tokenizer, 1200, special + SENTENCEPIECE_SPECIAL[3:])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(SPACED)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)])
    tokenizer = without_byte_tokens(tokenizer, special)
    tokenizer = retrained(tokenizer, fuse_unk=True, byte_fallback=True)
    tokenizer.add_tokens([AddedToken(c * n, normalized=False) for c in "\n▁\t" for n in (2, 3, 4)])
    return tokenizer


KINDS = {"llama3": llama3, "qwen2": qwen2, "gpt2": gpt2, "digits": digits, "llama2": llama2, "metaspace": metaspace,
         "metaspace-unknown": metaspace_unknown, "gemma": gemma}


def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.strip("\n") for text in corpus() for line in text.split("\n") if line.strip()),
        model_writer=model, model_type="bpe", vocab_size=1000, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, character_coverage=0.98, minloglevel=2, num_threads=1,
        max_sentence_length=100000)
    return model.getvalue()


def compact(value):
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def listed(values):
    return "[\n" + ",\n".join(compact(v) for v in values) + "\n]\n"


def cases(texts, encode, decode):
    ids = [encode(t) for t in texts]
    decoded = {str(i): d for i, (t, d) in enumerate(zip(texts, map(decode, ids))) if d != t}
    return '{"ids":' + listed(ids).rstrip("\n") + ',\n"decoded":' + compact(decoded) + "}\n"


def files():
    """Path and content of everything to write."""
    built = {}
    for kind, build in KINDS.items():
        result = build()
        tokenizer, state = result if isinstance(result, tuple) else (result, None)
        built[kind] = (tokenizer, state or json.loads(tokenizer.to_str()))
    named = [t for _, state in built.values() for t in state["added_tokens"]]
    special = sorted({t["content"] for t in named if t["special"]})
    added = sorted({t["content"] for t in named if not t["special"]})
    texts = strings(special, added)
    written = {"strings.json": listed(texts).encode()}
    for kind, (tokenizer, state) in built.items():
        written[f"{kind}/tokenizer.json"] = (compact(state) + "\n").encode()
        written[f"{kind}/cases.json"] = cases(
            texts, lambda t, k=tokenizer: k.encode(t).ids, lambda i, k=tokenizer: k.decode(i)).encode()
    model = sentencepiece_model()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    written["sentencepiece/tokenizer.model"] = model
    written["sentencepiece/cases.json"] = cases(
        texts, lambda t: [processor.bos_id()] + processor.encode(t), lambda i: processor.decode(i[1:])).encode()
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    arguments = parser.parse_args()
    different = []
    for name, content in files().items():
        path = HERE / name
        if arguments.check:
            if not path.exists() or path.read_bytes() != content:
                different.append(name)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if different:
        sys.exit("differ: " + ", ".join(different))


if __name__ == "__main__":
    main()
